"""How a server is set up: where it listens, what it keeps and how much it takes, each default once."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from vstar_engine.config.request import MAX_FRAMES

MIB = 2**20
HOUR = 3600.0
# names under which a browser on this machine reaches a server without keys
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True)
class Intervals:
    """Seconds between the server's periodic actions.

    watchdog: two checks of the jobs that the database says run here.
    lost_after: a job whose run is missing this long is resumed.
    reconcile: two counts of unfinished jobs, which other servers may have changed.
    sweep: two deletions of what is too old or too much.
    storage: two checks of a full disk, and the first pause before a video that could not be kept is made again.
    outcome_retry: two attempts to write an outcome.
    """

    watchdog: float = 2.0
    lost_after: float = 4.0
    reconcile: float = 10.0
    sweep: float = 60.0
    storage: float = 1.0
    outcome_retry: float = 1.0


@dataclass(frozen=True)
class Settings:
    """A server's settings. Times are in seconds, sizes in bytes; None is no limit.

    `max_queue` bounds the jobs that are waiting or running, `max_work` one job's frames x pixels x steps; `instance` must stay
    the same over restarts and differ between servers that share a database; those share `shared_videos` too.
    """

    data: Path = Path("vstar-data")
    database: str | None = None
    shared_videos: Path | None = None
    instance: str = "server-0"
    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False
    embeddings: Path | None = None
    max_queue: int = 64
    max_queue_per_key: int | None = None
    max_frames: int = MAX_FRAMES
    max_steps: int = 200
    # 128 frames of 320x512 in 100 steps
    max_work: int = 128 * 320 * 512 * 100
    max_body: int = MIB
    # with a file for each that is sent, under the 1024 descriptors that a process usually has
    max_connections: int = 400
    max_batch: int = 4
    batch_delay: float = 0.03
    min_free: int = 256 * MIB
    storage_wait: float = 300.0
    keep_for: float | None = None
    keep_bytes: int | None = None
    grace: float = 30.0
    sync_timeout: float = 600.0
    # for a client to send a whole request, and between two of them
    idle_timeout: float = 30.0
    intervals: Intervals = Intervals()

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_frames", "max_steps", "max_work", "max_body", "max_connections", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_queue_per_key is not None and self.max_queue_per_key < 1:
            raise ValueError(f"max_queue_per_key must be at least 1, got {self.max_queue_per_key}")
        for name in ("batch_delay", "min_free", "storage_wait", "grace", "sync_timeout", "idle_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("keep_for", "keep_bytes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"a port is 0 to 65535, got {self.port}")
        if not self.instance:
            raise ValueError("an instance needs a name")

    @property
    def videos(self) -> Path:
        """The folder of results."""
        return self.shared_videos or self.data / "videos"

    @property
    def database_url(self) -> str:
        """Where jobs are kept: a file beside the videos unless said otherwise."""
        return self.database or f"sqlite:///{(self.data / 'jobs.sqlite').absolute()}"

    @property
    def loopback(self) -> bool:
        """Returns whether only this machine can reach the server."""
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_bind(self, keys: int) -> None:
        """Raises ValueError where strangers could use a server that asks for no key."""
        if not keys and not self.loopback and not self.insecure:
            raise ValueError(
                f"{self.host} can be reached from other machines, and there are no keys: give --keys FILE or VSTAR_API_KEYS, "
                "or --insecure where the network is the guard"
            )

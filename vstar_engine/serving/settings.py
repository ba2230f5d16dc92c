"""The settings of a server, with their defaults and checks."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from vstar_engine.config.windows import LONGEST

MIB = 2**20
HOUR = 3600.0
ORIGIN = re.compile(r"https?://[^/?#@\s*,]+")
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
    queue_poll: two polls of the queue while jobs wait.
    idle_poll, shared_idle_poll: the same while no job is known to wait, in a database of one server and of several.
    recovered_idle_poll: the same for the queue of recovered jobs.
    """

    watchdog: float = 2.0
    lost_after: float = 4.0
    reconcile: float = 10.0
    sweep: float = 60.0
    storage: float = 1.0
    outcome_retry: float = 1.0
    queue_poll: float = 0.05
    idle_poll: float = 5.0
    shared_idle_poll: float = 1.0
    recovered_idle_poll: float = 30.0


@dataclass(frozen=True)
class Settings:
    """A server's settings. Times are in seconds, sizes in bytes; None is no limit.

    max_queue: jobs that wait or run.
    max_work: frames x pixels x steps of one job.
    instance: name of this server; the same after a restart, different for each server of one database.
    shared_videos: the results folder of all servers of one database.
    allow_origins: origins whose pages may use the API, as browsers spell them (https://example.com).
    """

    data: Path = Path("vstar-data")
    database: str | None = None
    shared_videos: Path | None = None
    instance: str = "server-0"
    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False
    allow_origins: tuple[str, ...] = ()
    embeddings: Path | None = None
    max_queue: int = 64
    max_queue_per_key: int | None = None
    max_frames: int = LONGEST
    max_steps: int = 200
    # 128 frames of 320x512 in 100 steps
    max_work: int = 128 * 320 * 512 * 100
    max_body: int = MIB
    # each may also need an open file; a process usually has 1024 descriptors
    max_connections: int = 400
    max_batch: int = 4
    batch_delay: float = 0.03
    min_free: int = 256 * MIB
    storage_wait: float = 300.0
    keep_for: float | None = None
    keep_bytes: int | None = None
    grace: float = 30.0
    sync_timeout: float = 600.0
    # for sending a whole request
    idle_timeout: float = 30.0
    # between two requests of a connection: longer than the 60 s of load balancers, which must be the first to close
    keep_alive: float = 75.0
    intervals: Intervals = Intervals()

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_frames", "max_steps", "max_work", "max_body", "max_connections", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_queue_per_key is not None and self.max_queue_per_key < 1:
            raise ValueError(f"max_queue_per_key must be at least 1, got {self.max_queue_per_key}")
        for name in ("batch_delay", "min_free", "storage_wait", "grace", "sync_timeout", "idle_timeout", "keep_alive"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("keep_for", "keep_bytes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be 0 to 65535, got {self.port}")
        for origin in self.allow_origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin is SCHEME://HOST[:PORT], such as https://example.com, got {origin!r}")
        if not self.instance:
            raise ValueError("instance must not be empty")

    @property
    def videos(self) -> Path:
        """Returns the results folder."""
        return self.shared_videos or self.data / "videos"

    @property
    def database_url(self) -> str:
        """Returns the URL of the database of jobs: by default an SQLite file in the data folder."""
        from sqlalchemy.engine import URL

        # the name of a folder may hold what a URL gives a meaning to
        path = str((self.data / "jobs.sqlite").absolute())
        return self.database or URL.create("sqlite", database=path).render_as_string(hide_password=False)

    @property
    def loopback(self) -> bool:
        """Returns whether the server can be reached only from this machine."""
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_bind(self, keys: int) -> None:
        """Raises ValueError if other machines could reach a server without keys."""
        if not keys and not self.loopback and not self.insecure:
            raise ValueError(
                f"other machines can reach {self.host}, and there are no API keys: give --keys FILE or VSTAR_API_KEYS, "
                "or --insecure if the network itself is protected"
            )

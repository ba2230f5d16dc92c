"""The engine as replicas on a Ray cluster. Each replica is an actor with a worker process; it sends finished files back.

Only JSON lines and the bytes of finished files are sent. Ray runs code for anyone who can connect to it, so its token
authentication is always on; use it in a private network all the same.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vstar_engine.errors import MissingLibrary, OutputError
from vstar_engine.serving.jobs import events, result_files
from vstar_engine.serving.settings import Settings

from .dispatch_state import BatchingPolicy, Message, WorkerError
from .dispatcher import Dispatcher
from .local_process import MODEL, ProcessLink

log = logging.getLogger(__name__)

NAMESPACE = "vstar-engine"
LOOPBACK = "127.0.0.1"
# seconds that an actor has to stop its worker before it is killed
ENDING = 5.0
DEFAULT_POLICY = BatchingPolicy()


def library() -> Any:
    """Imports Ray, with token authentication on and usage reports off."""
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        raise ValueError(
            f"RAY_AUTH_MODE must be token, got {os.environ['RAY_AUTH_MODE']!r}: otherwise anyone who connects runs code here"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # with Ray's default, 15, any other process starves the engine
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingLibrary(f"--ray needs the ray package ({error}); install it: pip install 'ray>=2.52,<3'") from error
    return ray


def connect(address: str | None) -> Any:
    """Joins a cluster, or starts one on this machine; returns the ray module. WorkerError if that fails."""
    ray = library()
    where = {"address": "local", "_node_ip_address": LOOPBACK} if address is None else {"address": address}
    try:
        ray.init(**where, namespace=NAMESPACE, include_dashboard=None if address else False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = f"cannot connect to a Ray cluster at {address or LOOPBACK}: {str(error).splitlines()[0]}"
        raise WorkerError(f"{said}; check the address, and that RAY_AUTH_TOKEN is the cluster's") from error
    return ray


def keep_sigterm() -> None:
    """Restores the SIGTERM handler. Ray's handler aborts a process after 3 s, and draining takes longer."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


class Replica:
    """The actor: the parent of a worker, on any node."""

    def __init__(self, environment: Mapping[str, str]):
        self.folder = Path(tempfile.mkdtemp(prefix="vstar-replica-"))
        self.link = ProcessLink(self.folder, environment, result_files.owner_of(self.folder.name))

    async def talk(self, line: str) -> AsyncIterator[tuple[str, dict[str, bytes]]]:
        """Starts a worker and yields its messages, each with the files of the video that it completes."""
        message = json.loads(line)
        async for said in await self.link.open(message):
            done = said["say"] == "event" and said["event"]["kind"] == events.Done.kind
            yield json.dumps(said), await asyncio.to_thread(self.take_files, said["id"]) if done else {}

    def take_files(self, id: str) -> dict[str, bytes]:
        """Reads a finished video's files and removes them from this node."""
        found = {name: (self.folder / name).read_bytes() for name in result_files.names(id)}
        result_files.remove(self.folder, id)
        return found

    async def tell(self, line: str) -> None:
        self.link.send(json.loads(line))

    async def kill(self) -> None:
        await self.link.kill()


class RayLink:
    """The connection to one replica; a lost actor is created again on any node with room."""

    def __init__(self, number: int, folder: Path, owner: str, environment: Mapping[str, str], resources: Mapping[str, float]):
        self.name, self.folder, self.owner = f"replica {number}", folder, owner
        self.environment, self.resources = dict(environment), dict(resources)
        self.actor: Any = None

    async def open(self, message: Message) -> AsyncIterator[Message]:
        """Creates the actor if there is none and starts its worker; returns an iterator over the messages."""
        ray = library()
        try:
            return self._messages(self._talk(json.dumps(message)))
        except ray.exceptions.RayError as error:
            raise WorkerError(f"{self.name} cannot be placed: {str(error).splitlines()[0]}") from error

    def _talk(self, line: str) -> Any:
        if self.actor is None:
            made = library().remote(Replica).options(**self.resources, max_restarts=0, scheduling_strategy="SPREAD")
            self.actor = made.remote(self.environment)
        return self.actor.talk.options(num_returns="streaming").remote(line)

    async def _messages(self, said: Any) -> AsyncIterator[Message]:
        ray = library()
        try:
            async for reference in said:
                line, files = await reference
                message = json.loads(line)
                if files:
                    message = await asyncio.to_thread(self.keep, message, files)
                yield message
        except ray.exceptions.RayError as error:
            log.warning("%s: %s", self.name, str(error).splitlines()[0])
            self.actor = None

    def keep(self, message: Message, files: Mapping[str, bytes]) -> Message:
        """Writes a video's files on this machine, the video last; returns the message, or a failure in its place."""
        done = message["event"]
        try:
            for name in sorted(files, key=lambda name: name == done["file"]):
                result_files.keep(files[name], self.folder / name, self.owner)
        except OutputError as error:
            code = events.STORAGE_FULL if result_files.is_full(error, self.folder) else events.GENERATION_FAILED
            result_files.discard(self.folder, message["id"])
            return {**message, "event": events.Failed(code, str(error), retry=True).to_json()}
        if hashlib.sha256(files[done["file"]]).hexdigest() != done["sha256"]:
            result_files.discard(self.folder, message["id"])
            failed = events.Failed(events.GENERATION_FAILED, "the video was corrupted in transfer", retry=True)
            return {**message, "event": failed.to_json()}
        return message

    def send(self, message: Message) -> None:
        if self.actor is not None:
            self.actor.tell.remote(json.dumps(message))

    async def kill(self) -> None:
        """Kills the replica's worker, or the actor if it does not answer."""
        actor, ray = self.actor, library()
        if actor is None:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(actor.kill.remote().future()), ENDING)
        except (ray.exceptions.RayError, TimeoutError):
            self.actor = None
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)


@dataclass(frozen=True)
class Replicas:
    """Where replicas run: how many, on the cluster at `address` (None: one started on this machine), each with `resources`.

    `resources` are Ray's, such as {"num_gpus": 1}.
    """

    count: int = 1
    address: str | None = None
    resources: Mapping[str, float] = field(default_factory=lambda: {"num_cpus": 1})

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"there must be at least 1 replica, got {self.count}")


ONE_REPLICA = Replicas()


class RayEngine(Dispatcher):
    """An `EngineClient` whose workers are actors on a Ray cluster.

    Results go to `folder` on this machine. `settings` are those of `factory`, as for `ProcessEngine`; the paths in them must
    exist on every node.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        policy: BatchingPolicy = DEFAULT_POLICY,
        factory: str = MODEL,
        environment: Mapping[str, str] | None = None,
        replicas: Replicas = ONE_REPLICA,
        instance: str = Settings.instance,
    ):
        self.folder, self.address, self.owner = folder.absolute(), replicas.address, result_files.owner_of(instance)
        numbers, resources = range(replicas.count), replicas.resources
        links = [RayLink(number, self.folder, self.owner, environment or {}, resources) for number in numbers]
        super().__init__(links, {"factory": factory, "settings": dict(settings)}, policy)

    async def start(self) -> None:
        """Joins the cluster and starts the replicas; returns once the first is warm."""
        self.folder.mkdir(parents=True, exist_ok=True)
        result_files.sweep(self.folder, self.owner)
        await asyncio.to_thread(connect, self.address)
        keep_sigterm()
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(asyncio.to_thread, library().shutdown)
            await super().start()
            undo.pop_all()

    async def close(self, grace: float) -> None:
        await super().close(grace)
        await asyncio.to_thread(library().shutdown)

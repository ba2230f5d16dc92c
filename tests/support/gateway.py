"""A service with its store and a played engine in one process, for tests of what stands between HTTP and the workers."""

import asyncio
from dataclasses import replace

import httpx

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.slow_engine import until
from vstar_engine.config.models import model_named
from vstar_engine.serving.http import app, service
from vstar_engine.serving.http.api_keys import ApiKeys
from vstar_engine.serving.http.request_to_job import Resolver
from vstar_engine.serving.http.schema import CreateVideo
from vstar_engine.serving.http.service import Caller
from vstar_engine.serving.jobs import events, result_files
from vstar_engine.serving.queue.runner import Runner
from vstar_engine.serving.settings import Settings

LIMIT = 15.0


OWNER = "alice"


FACTS = {"counters": dict.fromkeys(("restarts", "cache_bytes", "cache_hits", "cache_misses"), 0)}


class ScriptedEngine:
    """An engine that writes a job's files and then waits until the test says how it ends."""

    ready = True

    def __init__(self, folder):
        self.folder, self.begun, self.ends = folder, [], {}

    async def start(self):
        pass

    async def run(self):
        await asyncio.Event().wait()

    async def close(self, grace):
        pass

    def facts(self):
        return FACTS

    async def submit(self, job):
        if job.id in self.ends:
            raise ValueError(f"job {job.id} is already pending")
        self.begun.append(job.id)
        self.ends[job.id] = asyncio.get_running_loop().create_future()
        yield events.Started(1)
        for name in result_files.names(job.id):
            (self.folder / name).write_bytes(b"a video")
        yield await self.ends[job.id]
        del self.ends[job.id]

    async def cancel(self, id):
        if id in self.ends:
            self.end(id, events.Failed(events.CANCELLED, "cancelled"))

    def end(self, id, event=None):
        self.ends[id].set_result(event or events.Done(f"{id}.mp4", 7, "0" * 64, 8, 64, 32))


def scenario(folder, act, kind=ScriptedEngine, model="mini", runner=Runner, **settings):
    """Runs `act(gateway, engine)` between a start and a close."""

    async def run():
        chosen = Settings(data=folder, min_free=0, **settings)
        resolver = Resolver(replace(model_named("mini"), name=model), enhance=False)
        gateway = service.Service(chosen, kind(chosen.videos), resolver, runner)
        gateway.store.open()
        try:
            async with asyncio.timeout(LIMIT):
                await gateway.start()
                try:
                    return await act(gateway, gateway.engine)
                finally:
                    await gateway.close()
        finally:
            gateway.store.close()

    return asyncio.run(run())


def connected(gateway):
    """Returns a client of the application, within this process."""
    application = httpx.ASGITransport(app.build(gateway, ApiKeys({})), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=application, base_url="http://127.0.0.1")


async def created(gateway, engine):
    """Returns a job that runs."""
    body = CreateVideo(prompt="a tree", num_frames=8, size="64x32", num_inference_steps=2)
    id = (await gateway.create(Caller(OWNER), body)).job.id
    await until(lambda: id in engine.ends)
    return id


async def ended(gateway, id):
    await until(lambda: (progress := gateway.runner.tracker[id]) is None or progress.outcome is not None)
    return (await gateway.store.get(id)).outcome


def left(gateway):
    return sorted(path.name for path in gateway.settings.videos.iterdir())

"""The server under load: Poisson and burst arrivals, and what it adds to the bare engine for one video.

Clients are coroutines of this process, the server is a process of its own on this machine; each follows its video by the
server's events. A latency runs from the request to the event that says the video is complete.
"""

import argparse
import asyncio
import math
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vstar_engine import Engine
from vstar_engine.bench.harness.contest import Pace
from vstar_engine.bench.harness.rows import FAILED, SKIPPED, ResultFile, ResultRow, sentence
from vstar_engine.bench.harness.server import Server
from vstar_engine.bench.harness.timing import Timing, summarise
from vstar_engine.config.models import MODELS, model_named, parse_size
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling
from vstar_engine.machine.device import DTYPES

from .options import add_common, open_rows

if TYPE_CHECKING:
    import httpx

POISSON, BURST, OVERHEAD = "poisson", "burst", "overhead"
PARTS = (OVERHEAD, POISSON, BURST)
STATES = ["deep snow, bare trees", "the snow melts", "green shoots", "flowers bloom"]


@dataclass(frozen=True)
class Outcome:
    """One request: seconds until its answer and until its video; `status` is the job's, or HTTP's where it was refused."""

    post: float
    latency: float
    status: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the load and the model."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    add_common(parser, rounds=9, limit=300.0)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="default all")
    parser.add_argument("--model", choices=MODELS, default="mini", help="default %(default)s")
    parser.add_argument("--weights", type=Path, help="folder made by `vstar-engine convert`; mini needs none")
    parser.add_argument(
        "--dtype", choices=DTYPES, default={"cuda": "float16", "cpu": "float32"}[there], help="default %(default)s"
    )
    parser.add_argument("--device", default=there, help="default %(default)s")
    parser.add_argument("--frames", type=int, default=16, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="default %(default)s")
    parser.add_argument("--size", default="", metavar="HEIGHTxWIDTH", help="default: the model's own")
    parser.add_argument("--jobs", type=int, default=24, help="videos of each load (default %(default)s)")
    parser.add_argument(
        "--rate", type=float, help="videos a second that arrive (default: 0.8 of what one after the other allows)"
    )
    parser.add_argument("--slo", type=float, help="seconds within which a video is wanted (default: 5 times one alone)")
    parser.add_argument("--max-batch", type=int, default=4, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default %(default)s)")


def body_of(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Returns the request for one video."""
    height, width = parse_size(args.size) if args.size else model_named(args.model).size
    fields = {"num_frames": args.frames, "num_inference_steps": args.steps, "size": f"{width}x{height}", "seed": seed}
    return {"prompt": "a landscape from winter to spring", "synopsis": STATES, **fields}


def arrivals(part: str, jobs: int, rate: float, seed: int) -> list[float]:
    """Returns the seconds at which requests come: at random with a mean rate, or all at once."""
    if part == BURST:
        return [0.0] * jobs
    chance = random.Random(seed)
    times = [0.0]
    while len(times) < jobs:
        times.append(times[-1] + chance.expovariate(rate))
    return times


async def one(http: "httpx.AsyncClient", body: dict[str, Any], wait: Awaitable[None]) -> Outcome:
    """Submits at its time and follows the events to the end."""
    await wait
    begun = time.perf_counter()
    answer = await http.post("/v1/videos", json=body)
    post = time.perf_counter() - begun
    if answer.status_code != 200:
        return Outcome(post, math.inf, f"HTTP {answer.status_code}")
    async with http.stream("GET", f"/v1/videos/{answer.json()['id']}/events", timeout=None) as events:
        kind = ""
        async for line in events.aiter_lines():
            if line.startswith("event:"):
                kind = line.partition(":")[2].strip()
            if line.startswith("data:") and kind in ("completed", "failed"):
                return Outcome(post, time.perf_counter() - begun, kind)
    raise RuntimeError("the events of a video broke off")


async def drive(url: str, bodies: Sequence[dict[str, Any]], times: Sequence[float]) -> tuple[list[Outcome], float]:
    """Runs a load; returns every outcome and the seconds that the whole took."""
    import httpx

    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None), timeout=60) as http:
        begun = time.perf_counter()
        loads = (one(http, body, asyncio.sleep(at)) for body, at in zip(bodies, times, strict=True))
        return list(await asyncio.gather(*loads)), time.perf_counter() - begun


def measured(outcomes: Sequence[Outcome], whole: float, slo: float) -> dict[str, Any]:
    """Reduces a load to its latencies, throughput and the share of requests served in time; refused ones are not in time."""
    done = [outcome.latency for outcome in outcomes if outcome.status == "completed"]
    posts = [outcome.post for outcome in outcomes]
    if not done:
        raise RuntimeError(f"no video was completed: {', '.join(sorted({outcome.status for outcome in outcomes}))}")
    timing = summarise(done)
    return {
        **spread(timing),
        **{f"p{p}": percentile(done, p) for p in (95, 99)},
        "post_p50": percentile(posts, 50),
        "post_p99": percentile(posts, 99),
        "throughput": len(done) / whole,
        "slo": slo,
        "attained": sum(latency <= slo for latency in done) / len(outcomes),
        "completed": len(done),
        "refused": sum(outcome.status.startswith("HTTP") for outcome in outcomes),
        "failed": sum(outcome.status == "failed" for outcome in outcomes),
    }


def spread(timing: Timing) -> dict[str, float]:
    """Returns what every row says of a time."""
    return {"median": timing.median, "p20": timing.p20, "p80": timing.p80, "rounds": timing.rounds}


def percentile(values: Sequence[float], p: float) -> float:
    """Returns the smallest value that is at least as large as `p` percent of them."""
    return sorted(values)[max(math.ceil(p / 100 * len(values)) - 1, 0)]


def bare(args: argparse.Namespace, folder: Path) -> Any:
    """Loads the engine here; returns a function that makes one video as the server would, to its mp4."""
    engine = Engine.load(args.model, args.weights, "eager", args.device, args.dtype)
    body = body_of(args, 0)
    width, height = map(int, body["size"].split("x"))
    request = Request(tuple(STATES), args.frames, 0, (height, width), Sampling(steps=args.steps))

    def make() -> None:
        engine.run(request).save(folder / "bare.mp4")

    return make


def overhead(args: argparse.Namespace, server: Server, folder: Path, pace: Pace) -> dict[str, Any]:
    """Times one video by /v1/videos/sync and by the bare engine in turn; the difference is the server's.

    After one of each to warm up no round starts that would end after the limit or the deadline, but for a first one.
    """
    import httpx

    make = bare(args, folder)
    seconds: dict[str, list[float]] = {"served": [], "bare": [], "own": []}
    with httpx.Client(base_url=server.url, timeout=600) as http:
        start = time.monotonic()
        for round in range(pace.rounds + 1):
            spent = time.monotonic() - start
            if round > 1 and (spent * (round + 1) / round > pace.limit or pace.left < spent / round):
                break
            begun = time.perf_counter()
            answer = http.post("/v1/videos/sync", json=body_of(args, 0))
            served = time.perf_counter() - begun
            answer.raise_for_status()
            begun = time.perf_counter()
            make()
            if round:  # the first of each warms up
                seconds["bare"].append(time.perf_counter() - begun)
                seconds["served"].append(served)
                seconds["own"].append(served - float(answer.headers["x-inference-time-s"]))
    timing = summarise(seconds["served"])
    alone = statistics.median(seconds["bare"])
    differences = summarise([served - bare for served, bare in zip(seconds["served"], seconds["bare"], strict=True)])
    return {
        **spread(timing),
        "bare": alone,
        "overhead": timing.median - alone,
        "overhead_p20": differences.p20,
        "allowed": 0.05 + 0.01 * alone,
        "outside_stages": statistics.median(seconds["own"]),
    }


def judged(row: ResultRow, numbers: dict[str, Any]) -> ResultRow:
    """Returns the overhead's row; failed where four rounds of five took more than is allowed."""
    row = replace(row, numbers=numbers)
    if numbers["overhead_p20"] <= numbers["allowed"]:
        return row
    said = (f"{1e3 * numbers[name]:.0f} ms" for name in ("overhead", "overhead_p20", "allowed"))
    return replace(
        row, status=FAILED, note="the server adds {}, in four rounds of five more than {}; {} are allowed".format(*said)
    )


def alone_of(args: argparse.Namespace, url: str) -> float:
    """Returns the seconds from request to video of one video alone, after another that warms up."""
    for seed in (1, 2):
        (outcome,), _ = asyncio.run(drive(url, [body_of(args, seed)], [0.0]))
        if outcome.status != "completed":
            raise RuntimeError(f"no video was completed: {outcome.status}")
    return outcome.latency


def words_of(args: argparse.Namespace) -> list[str]:
    """Returns the options of the server."""
    named = ["--model", args.model, "--device", args.device, "--dtype", args.dtype, "--max-batch", str(args.max_batch)]
    return [*named, *(["--weights", str(args.weights)] if args.weights else []), "--max-queue", str(max(2 * args.jobs, 64))]


def run(args: argparse.Namespace) -> int:
    """Measures what the flags say; 1 if something failed."""
    import httpx

    if args.rehearse:
        args.model, args.weights, args.device, args.dtype = "mini", None, "cpu", "float32"
        args.frames, args.steps, args.size, args.jobs, args.rounds = 4, 2, "32x32", 4, 1
    if args.jobs < 1 or (args.rate is not None and args.rate <= 0):
        raise ValueError(f"jobs must be at least 1 and a rate above 0, got {args.jobs} and {args.rate}")
    size = body_of(args, 0)["size"]
    case = {"model": args.model, "frames": args.frames, "steps": args.steps, "size": size, "max_batch": args.max_batch}
    row = ResultRow("serve", case, "vstar-engine serve", args.dtype, args.device)
    pace = Pace.within(args.budget, rounds=args.rounds, limit=args.limit)
    with open_rows(args) as rows, tempfile.TemporaryDirectory() as folder:
        try:
            with Server(Path(folder), words_of(args)) as server:
                measure(args, row, server, Path(folder), rows, pace)
        except (RuntimeError, httpx.HTTPError, OSError) as error:
            rows.write(replace(row, status=FAILED, note=sentence(error)))
    return 1 if rows.failures else 0


def measure(args: argparse.Namespace, row: ResultRow, server: Server, folder: Path, rows: ResultFile, pace: Pace) -> None:
    """Measures one video alone, then each load that fits into what is left."""
    alone = alone_of(args, server.url)
    rate, slo = args.rate or 0.8 / alone, args.slo or 5 * alone
    for part in args.parts:
        case = {"part": part, **row.case}
        if part == OVERHEAD:
            wanted = 2 * (pace.warmup + 1) * alone
        else:
            case |= {"jobs": args.jobs, **({"rate": round(rate, 3)} if part == POISSON else {})}
            wanted = args.jobs * max(alone, 1 / rate if part == POISSON else 0.0)
        if wanted > min(pace.limit, pace.left):
            note = f"takes about {wanted:.0f} s; --limit is {pace.limit:g}, and {max(pace.left, 0.0):.0f} s were left"
            rows.write(replace(row, case=case, status=SKIPPED, note=note))
            continue
        if part == OVERHEAD:
            rows.write(judged(replace(row, case=case), overhead(args, server, folder, pace)))
            continue
        bodies = [body_of(args, seed) for seed in range(args.jobs)]
        outcomes, whole = asyncio.run(drive(server.url, bodies, arrivals(part, args.jobs, rate, args.seed)))
        rows.write(replace(row, case=case, numbers=measured(outcomes, whole, slo)))

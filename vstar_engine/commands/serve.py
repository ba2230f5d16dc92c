"""The `serve` command: videos over HTTP."""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from vstar_engine.config.models import parse_size
from vstar_engine.config.sampling import Sampling
from vstar_engine.errors import MissingLibrary, OutputError
from vstar_engine.model_choice import ModelChoice
from vstar_engine.serving.jobs.events import EngineClient
from vstar_engine.serving.settings import HOUR, MIB, Settings
from vstar_engine.weights.bundled import BUNDLED

from .model_options import add_fast_option, add_model_options, choice_from, fast_from
from .option_sources import add_config_options
from .prompt_options import add_llm_options, llm_from
from .weights_options import with_weights

EXTRA = "pip install -e '.[serve]' in the clone"
LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `serve`; defaults come from `Settings`."""
    _add_server_options(parser.add_argument_group("server"))
    _add_limit_options(parser.add_argument_group("limits"))
    _add_scale_options(parser.add_argument_group("scale"))
    model = parser.add_argument_group("model")
    add_model_options(parser)
    add_fast_option(parser)
    model.add_argument("--embeddings", type=Path, metavar="DIR", help="folder of `embed` files that requests may name")
    model.add_argument(
        "--renderer", metavar="MODULE:FUNCTION", help="function that makes videos in the worker instead of the engine"
    )
    model.add_argument("--renderer-settings", type=_json_object, default="{}", metavar="JSON", help="argument of that function")
    add_llm_options(parser)
    add_config_options(parser)


def _json_object(text: str) -> str:
    """Returns a text unchanged; raises unless it is a JSON object."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no JSON object")
    return text


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    def add(name: str, **how: Any) -> None:
        how.setdefault("default", getattr(Settings, name))
        group.add_argument(f"--{name.replace('_', '-')}", **how)

    add("host", help="address to listen on (default %(default)s)")
    add("port", type=int, help="port to listen on (default %(default)s)")
    add("data", type=Path, metavar="DIR", help="folder of videos and jobs (default %(default)s)")
    add("database", metavar="URL", help="postgresql://... for the jobs, instead of SQLite in the data folder")
    group.add_argument(
        "--videos",
        type=Path,
        metavar="DIR",
        help="folder of videos, shared by all servers of one database (default DATA/videos)",
    )
    add("instance", metavar="NAME", help="name of this server, unique among the servers of one database and kept over restarts")
    group.add_argument(
        "--keys", type=Path, metavar="FILE", help="file of API keys, `[OWNER ]KEY` on each line (or $VSTAR_API_KEYS)"
    )
    add("insecure", action="store_true", help="accept requests from other machines without API keys")
    group.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="origin whose pages may use the API (CORS), such as https://example.com; repeatable (default: none but its own)",
    )
    add(
        "grace",
        type=float,
        metavar="S",
        help="seconds that running jobs get to finish when the server stops (default %(default)g)",
    )
    group.add_argument("--log-level", choices=LEVELS, default="info", help="least level that is logged (default %(default)s)")
    group.add_argument("--log-text", action="store_true", help="log plain text instead of JSON")


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    def add(name: str, help: str, kind: type = int, **how: Any) -> None:
        default = getattr(Settings, name)
        said = help if default is None else f"{help} (default %(default)s)"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=said, **how)

    add("max_queue", "most jobs queued or running")
    add("max_queue_per_key", "most jobs of one API key queued or running")
    add("max_frames", "most frames of a video")
    add("max_steps", "most denoising steps of a video")
    add("max_work", "most frames x pixels x steps of a video")
    add("max_connections", "most open connections; beyond, the slowest client's is closed")
    add("keep_alive", "seconds that a connection stays open between requests", float, metavar="S")
    add("max_batch", "largest batch, where warm-up measured that batching pays")
    add("batch_delay", "seconds that a job waits for others to form a batch", float, metavar="S")
    add("sync_timeout", "longest time of a request to /v1/videos/sync, in seconds", float, metavar="S")
    group.add_argument(
        "--min-free",
        type=int,
        default=Settings.min_free // MIB,
        metavar="MIB",
        help="disk space to keep free in the folder of videos (default %(default)s)",
    )
    group.add_argument(
        "--keep-hours", type=float, metavar="H", help="delete videos this long after their job ended (default: never)"
    )
    group.add_argument(
        "--keep-mib", type=int, metavar="MIB", help="delete the oldest videos beyond this total size (default: no limit)"
    )


def _add_scale_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ray", action="store_true", help="run replicas of the engine on a Ray cluster; needs the scale extra")
    group.add_argument(
        "--replicas", type=int, metavar="N", help="number of replicas (default 1), each with its own GPU on CUDA"
    )
    group.add_argument("--address", metavar="HOST:PORT", help="head of the cluster (default: a cluster on this machine)")
    group.add_argument(
        "--warm",
        action="append",
        metavar="FRAMESxHEIGHTxWIDTH",
        help="clip size to warm up and measure batches for at start; repeatable (default: usual lengths)",
    )


def parse_clip(text: str) -> tuple[int, int, int]:
    """Reads FRAMESxHEIGHTxWIDTH."""
    frames, x, size = text.lower().partition("x")
    if not (x and frames.isdecimal() and int(frames)):
        raise ValueError(f"a clip is FRAMESxHEIGHTxWIDTH, such as 64x320x512, got {text!r}")
    return int(frames), *parse_size(size)


def settings_from(args: argparse.Namespace) -> Settings:
    """Returns the settings that options give; ValueError for one that makes no sense."""
    same = (
        *("data", "database", "instance", "host", "port", "insecure", "embeddings", "grace", "sync_timeout"),
        *(
            "max_queue",
            "max_queue_per_key",
            "max_frames",
            "max_steps",
            "max_work",
            "max_connections",
            "keep_alive",
            "max_batch",
            "batch_delay",
        ),
    )
    return Settings(
        **{name: getattr(args, name) for name in same},
        shared_videos=args.videos,
        # browsers send origins in lower case and without a path
        allow_origins=tuple(origin.strip().lower().rstrip("/") for origin in args.allow_origin or ()),
        min_free=args.min_free * MIB,
        keep_for=None if args.keep_hours is None else args.keep_hours * HOUR,
        keep_bytes=None if args.keep_mib is None else args.keep_mib * MIB,
    )


def choice_of(args: argparse.Namespace) -> ModelChoice:
    """Returns the model that options choose, by default the bundled one."""
    if args.model is None and args.weights is None and args.engine is None:
        args.model = BUNDLED[0]
        log.warning("no model is named: serving %s, which comes with the package (--model, --weights, --engine)", args.model)
    choice = choice_from(args)
    if choice.spec.streaming is not None:
        raise ValueError(f"a server makes videos in one piece, and {choice.model} makes them in chunks: use `generate`")
    return choice


def worker_settings(args: argparse.Namespace, choice: ModelChoice, data: Path) -> dict[str, Any]:
    """Returns the worker's settings as plain values: the model and its folders, or a renderer's own."""
    if args.renderer is not None:
        return json.loads(args.renderer_settings)
    embeddings = None if args.embeddings is None else str(args.embeddings.absolute())
    checkpoints = str((data / "checkpoints").absolute())
    return {"engine": choice.arguments(), "embeddings": embeddings, "checkpoints": checkpoints}


def run(args: argparse.Namespace) -> int:
    """Runs `serve` until it is stopped."""
    try:
        from vstar_engine.serving.http import api_keys, app, request_to_job, server, service
        from vstar_engine.serving.telemetry import request_log, tracing
    except ImportError as error:
        if (error.name or "").startswith("vstar_engine"):
            raise
        raise MissingLibrary(f"serving needs {error.name}, which is not installed; {EXTRA}") from error
    settings = settings_from(args)
    known = api_keys.ApiKeys.read(args.keys)
    settings.check_bind(len(known))
    request_log.configure(args.log_level, not args.log_text)
    tracing.configure()
    choice = choice_of(args)
    if args.renderer is None:
        choice = with_weights(choice, args.yes)
        choice.check_weights()
    llm, usual = None if args.no_synopsis else llm_from(args), Sampling.usual(fast_from(args)[0], choice.spec.defaults)
    for secret in (api_keys.ENVIRONMENT, "VSTAR_DATABASE", args.llm_key_env or ""):  # the workers inherit what is left
        os.environ.pop(secret, None)
    resolver = request_to_job.Resolver(
        choice.spec, choice.engine, settings.embeddings, not args.no_synopsis, llm, args.llm_required, usual
    )
    engine = _engine(args, settings, choice)
    gateway = service.Service(settings, engine, resolver)
    try:
        gateway.store.open()
        server.Server(app.build(gateway, known), gateway).run(server.bound(settings.host, settings.port))
    except OSError as error:
        raise OutputError(f"cannot serve from {settings.data}: {error.strerror or error}") from error
    finally:
        gateway.store.close()
    if gateway.failure is not None:
        raise gateway.failure
    return 0


def _engine(args: argparse.Namespace, settings: Settings, choice: ModelChoice) -> EngineClient:
    """Returns the engine: in a child process, or as replicas on a Ray cluster."""
    from vstar_engine.serving.workers import local_process

    buckets = tuple(parse_clip(text) for text in args.warm or ())
    policy = local_process.BatchingPolicy(buckets, settings.max_batch, settings.batch_delay, fast=fast_from(args)[0])
    what = (settings.videos, worker_settings(args, choice, settings.data), policy, args.renderer or local_process.MODEL)
    if not args.ray:
        if args.replicas is not None or args.address is not None:
            raise ValueError("--replicas and --address are for --ray; without it there is one engine, on this machine")
        return local_process.ProcessEngine(*what, instance=settings.instance)
    from vstar_engine.serving.workers import ray_cluster

    ray_cluster.library()
    resources = {"num_gpus": 1} if choice.device.startswith("cuda") else {"num_cpus": 1}
    replicas = ray_cluster.Replicas(1 if args.replicas is None else args.replicas, args.address, resources)
    return ray_cluster.RayEngine(*what, replicas=replicas, instance=settings.instance)

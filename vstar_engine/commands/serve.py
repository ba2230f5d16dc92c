"""The `serve` command: settings from flags, environment and file, an engine behind them, and an orderly end."""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.built_engine import Artifact
from vstar_engine.config.models import model_named, parse_size
from vstar_engine.config.sampling import Sampling
from vstar_engine.errors import MissingLibrary, OutputError
from vstar_engine.model_choice import Choice
from vstar_engine.serving.jobs.events import EngineClient
from vstar_engine.serving.settings import HOUR, MIB, Settings
from vstar_engine.weights.bundled import BUNDLED

from .model_options import add_fast_option, add_model_options, fast_from
from .option_sources import add_config_options
from .prompt_options import add_llm_options, llm_from

EXTRA = "pip install 'vstar-engine[serve]'"
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
    model.add_argument(
        "--embeddings", type=Path, metavar="DIR", help="bundles of `embed`, for requests that name one by its id"
    )
    model.add_argument("--renderer", metavar="MODULE:FUNCTION", help="what makes videos in the worker, instead of the engine")
    model.add_argument(
        "--renderer-settings", type=_json_object, default="{}", metavar="JSON", help="what that function is given"
    )
    add_llm_options(parser)
    add_config_options(parser)


def _json_object(text: str) -> str:
    """Checks that a text is a JSON object, and keeps it as it was given."""
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

    add("host", help="address to listen at (default %(default)s)")
    add("port", type=int, help="default %(default)s")
    add("data", type=Path, metavar="DIR", help="folder of videos and jobs (default %(default)s)")
    add("database", metavar="URL", help="postgresql://... instead of a file in the folder")
    group.add_argument(
        "--videos", type=Path, metavar="DIR", help="folder of videos, for all servers of one database (default DATA/videos)"
    )
    add("instance", metavar="NAME", help="stays the same over restarts, differs between servers of one database")
    group.add_argument("--keys", type=Path, metavar="FILE", help="a key a line, `[OWNER ]KEY`; or $VSTAR_API_KEYS")
    add("insecure", action="store_true", help="listen to other machines without keys")
    add("grace", type=float, metavar="S", help="seconds that running jobs have when the server is to end (default %(default)g)")
    group.add_argument("--log-level", choices=LEVELS, default="info", help="default %(default)s")
    group.add_argument("--log-text", action="store_true", help="log plain lines instead of JSON")


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    def add(name: str, help: str, kind: type = int, **how: Any) -> None:
        default = getattr(Settings, name)
        said = help if default is None else f"{help} (default %(default)s)"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=said, **how)

    add("max_queue", "jobs that wait or run")
    add("max_queue_per_key", "jobs of one key that wait or run")
    add("max_frames", "frames of a video")
    add("max_steps", "denoising steps of a video")
    add("max_work", "frames x pixels x steps of a video")
    add("max_connections", "connections of clients; beyond, the one goes whose client is slowest")
    add("max_batch", "largest batch, where warm-up measured that batching pays")
    add("batch_delay", "seconds that a job waits for others to form a batch", float, metavar="S")
    add("sync_timeout", "seconds that a request to /v1/videos/sync takes", float, metavar="S")
    group.add_argument(
        "--min-free",
        type=int,
        default=Settings.min_free // MIB,
        metavar="MIB",
        help="kept free where videos are (default %(default)s)",
    )
    group.add_argument(
        "--keep-hours", type=float, metavar="H", help="delete videos this long after they ended (default: never)"
    )
    group.add_argument("--keep-mib", type=int, metavar="MIB", help="delete the oldest videos beyond this size (default: none)")


def _add_scale_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ray", action="store_true", help="run replicas of the engine on a Ray cluster; needs the scale extra")
    group.add_argument("--replicas", type=int, metavar="N", help="how many (default 1), each with a GPU of its own on CUDA")
    group.add_argument("--address", metavar="HOST:PORT", help="the cluster's head (default: a cluster on this machine alone)")
    group.add_argument(
        "--warm",
        action="append",
        metavar="FRAMESxHEIGHTxWIDTH",
        help="a clip to warm before the first request, and to measure batches for; repeatable (default: usual lengths)",
    )


def parse_clip(text: str) -> tuple[int, int, int]:
    """Reads FRAMESxHEIGHTxWIDTH."""
    frames, x, size = text.lower().partition("x")
    if not (x and frames.isdecimal() and int(frames)):
        raise ValueError(f"a clip is FRAMESxHEIGHTxWIDTH, such as 64x320x512, got {text!r}")
    return int(frames), *parse_size(size)


def settings_from(args: argparse.Namespace) -> Settings:
    """Returns the settings that options say; ValueError where one makes no sense."""
    same = (
        *("data", "database", "instance", "host", "port", "insecure", "embeddings", "grace", "sync_timeout"),
        *(
            "max_queue",
            "max_queue_per_key",
            "max_frames",
            "max_steps",
            "max_work",
            "max_connections",
            "max_batch",
            "batch_delay",
        ),
    )
    return Settings(
        **{name: getattr(args, name) for name in same},
        shared_videos=args.videos,
        min_free=args.min_free * MIB,
        keep_for=None if args.keep_hours is None else args.keep_hours * HOUR,
        keep_bytes=None if args.keep_mib is None else args.keep_mib * MIB,
    )


def choice_of(args: argparse.Namespace) -> tuple[Choice, Artifact | None]:
    """Returns the model that is asked for; the bundled one where nothing is."""
    if args.model is None and args.weights is None and args.engine is None:
        args.model = BUNDLED[0]
        log.warning("no model is named: serving %s, which comes with the package (--model, --weights, --engine)", args.model)
    artifact = None if args.engine is None else Artifact.open(args.engine)
    return Choice.of(artifact, args.model, args.weights, args.backend, args.device, args.dtype), artifact


def worker_settings(args: argparse.Namespace, choice: Choice) -> dict[str, Any]:
    """Returns what the worker loads, as plain values: `Engine.load`'s arguments and where bundles lie, or a renderer's own."""
    if args.renderer is not None:
        return json.loads(args.renderer_settings)
    engine = {
        "model": choice.model,
        "weights": None if choice.weights is None else str(choice.weights),
        "backend": choice.backend,
        "device": choice.device,
        "dtype": choice.dtype,
        "spatial_attention": args.spatial_attention,
        "graphs": args.graphs,
        "engine": args.engine,
        "loras": list(args.lora or ()),
        "fp8": fast_from(args)[1],
    }
    return {"engine": engine, "embeddings": None if args.embeddings is None else str(args.embeddings.absolute())}


def run(args: argparse.Namespace) -> int:
    """Runs `serve` until it is told to end."""
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
    choice, artifact = choice_of(args)
    if args.renderer is None:
        choice.check_weights()
    llm, usual = None if args.no_synopsis else llm_from(args), Sampling.usual(fast_from(args)[0])
    for secret in (api_keys.ENVIRONMENT, "VSTAR_DATABASE", args.llm_key_env or ""):  # the workers inherit what is left
        os.environ.pop(secret, None)
    resolver = request_to_job.Resolver(
        model_named(choice.model), artifact, settings.embeddings, not args.no_synopsis, llm, args.llm_required, usual
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


def _engine(args: argparse.Namespace, settings: Settings, choice: Choice) -> EngineClient:
    """Returns the engine that is asked for: in a child process, or as replicas on a Ray cluster."""
    from vstar_engine.serving.workers import local_process

    buckets = tuple(parse_clip(text) for text in args.warm or ())
    policy = local_process.BatchingPolicy(buckets, settings.max_batch, settings.batch_delay, fast=fast_from(args)[0])
    what = (settings.videos, worker_settings(args, choice), policy, args.renderer or local_process.MODEL)
    if not args.ray:
        if args.replicas is not None or args.address is not None:
            raise ValueError("--replicas and --address are for --ray; without it there is one engine, on this machine")
        return local_process.ProcessEngine(*what, instance=settings.instance)
    from vstar_engine.serving.workers import ray_cluster

    ray_cluster.library()
    resources = {"num_gpus": 1} if choice.device.startswith("cuda") else {"num_cpus": 1}
    replicas = ray_cluster.Replicas(1 if args.replicas is None else args.replicas, args.address, resources)
    return ray_cluster.RayEngine(*what, replicas=replicas, instance=settings.instance)

"""Builds an engine into its folder: locked, written aside, private, and named by what shaped it."""

import fcntl
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from vstar_engine.artifacts.built_engine import KIND, BuiltEngine, check_engine, engines_root, name_of
from vstar_engine.artifacts.files import check_writable, clear_killed, make_private, write_aside
from vstar_engine.artifacts.manifest import write_manifest
from vstar_engine.backends import backend_named
from vstar_engine.errors import EngineError, OutputError
from vstar_engine.version import __version__
from vstar_engine.weights import bundled
from vstar_engine.weights.checkpoint import Weights

from .build_settings import Settings
from .builders import Report, builder_named

MIB = 2**20


def identity(settings: Settings, weights: Weights) -> dict[str, object]:
    """Returns what will be in the manifest; MissingLibrary where the back end's library is absent."""
    options = builder_named(settings.backend).options(settings)
    requirements = backend_named(settings.backend).requirements(settings.device, options)
    return settings.identity(weights.fingerprint(), requirements, options)


def place(settings: Settings, weights: Weights, out: Path | None) -> Path:
    """Returns the folder an engine goes to: `out`, else one named by its identity among the user's engines."""
    return out or engines_root() / name_of(identity(settings, weights))


def build(
    settings: Settings,
    weights: Weights,
    out: Path | None = None,
    force: bool = False,
    report: Report = print,
    source: BuiltEngine | None = None,
) -> BuiltEngine:
    """Builds an engine, or returns the existing one if it has the same identity.

    With a `source` that was built for it, its weights are swapped instead. `report` is called with a line for each stage.
    Raises OutputError where the folder cannot be written, is not an engine, or holds another one and `force` is off; then no
    folder that looks finished is left behind.
    """
    wanted, folder = identity(settings, weights), place(settings, weights, out)
    if out is None:
        _make_root(folder.parent)
    check_writable(folder, force=True, made=("*",))
    with _locked(folder, report):
        clear_killed(folder)  # this build has the lock
        if folder.exists():
            _check_replaceable(folder)
            if not force:
                return _same(folder, wanted)
        with write_aside(folder, folder=True, private=True) as aside:
            start = time.perf_counter()
            builder = builder_named(settings.backend)
            _check_space(aside, builder.estimate(settings).disk)
            if source is None:
                facts = builder.build(settings, weights, aside, report)
            else:
                facts = builder.refit(settings, source, weights, aside, report)
            seconds = time.perf_counter() - start
            content = {
                "kind": KIND,
                "name": name_of(wanted),
                "identity": wanted,
                "facts": facts,
                "weights_path": None if weights.path.is_relative_to(bundled.FOLDER) else str(weights.path.absolute()),
                "loras": [str(lora) for lora in getattr(weights, "loras", ())],
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "made_by": {"vstar-engine": __version__, "torch": torch.__version__},
                "seconds": round(seconds, 1),
                "peak_memory": _peak_memory(),
            }
            write_manifest(aside, content)
    return BuiltEngine.open(folder)


def _peak_memory() -> int:
    """Returns the bytes of the largest process so far: this one since it began, or a child such as a compiler."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _check_space(folder: Path, needed: int) -> None:
    """Raises OutputError where a disk is too full for what will be written, before hours of work."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"the engine takes {needed // MIB} MiB where {folder.parent} has {free // MIB} MiB free; give --out")


def _check_replaceable(path: Path) -> None:
    """Raises OutputError for what is neither an engine nor an empty folder: it would be deleted."""
    if path.is_dir() and not any(path.iterdir()):
        return
    try:
        check_engine(path)
    except EngineError as error:
        raise OutputError(f"{error}; it is left as it is, so give another name") from error


def _same(folder: Path, wanted: dict[str, object]) -> BuiltEngine:
    try:
        there = BuiltEngine.open(folder)
    except EngineError as error:
        raise OutputError(f"{folder} is taken: {error}; give --force to replace it, or another name") from error
    if there.identity != wanted:
        raise OutputError(f"{folder} holds another engine, {there.name}; give --force to replace it, or another name")
    return there


def _make_root(root: Path) -> None:
    try:
        make_private(root)
    except OSError as error:
        raise OutputError(f"cannot make {root}: {error.strerror}; give --out or VSTAR_ENGINES") from error


@contextmanager
def _locked(folder: Path, report: Report) -> Iterator[None]:
    """Locks a folder for one build at a time; a second build reports that it waits."""
    path = folder.absolute().parent / f".{folder.name}.lock"
    handle = _lock(path, folder, report)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, folder: Path, report: Report) -> int:
    """Opens and locks a file; again where whoever held it has removed it meanwhile."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another build of {folder} runs; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)

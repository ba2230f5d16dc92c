"""Built engines: private folders named by everything that shaped them, and refused where any of that differs.

<engines>/<model>-<backend>-<dtype>-<frames>-<size>-<hash>/manifest.json, unet.onnx, ...
"""

import json
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_engine.config.models import MAX_SIDE, model_named
from vstar_engine.config.request import MAX_FRAMES, Clip, rows_at_once
from vstar_engine.config.sampling import STEP_CACHE
from vstar_engine.errors import EngineError, OutputError

from .files import PRIVATE, digest_of, user_cache
from .manifest import MANIFEST, read_manifest

KIND = "vstar-engine engine"
HASH_LENGTH = 12
MAX_FRAMES_WORDS = 40  # letters that lengths may take in a name, which a disk bounds
MAX_BATCH = 8  # rows at once that an engine can be built for
# what shaped an engine, as a sentence calls it
CALLED = {
    "model": "model",
    "backend": "back end",
    "dtype": "dtype",
    "device": "device",
    "weights": "weights",
    "sources": "sources",
}
# what changes under an engine while it stays the same one
STALE = ("weights", "sources", "versions")


def _is(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _all(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(each, kind) for each in value)


# what an engine's manifest states beside its files, and of what kind
STATED = {
    **dict.fromkeys(("name", "made"), _is(str)),
    **dict.fromkeys(("identity", "facts"), _is(dict)),
    "weights_path": _is(str | None),
    "loras": _all(str),
    "seconds": _is(int | float),
    "peak_memory": _is(int),
}
SHAPED = {
    **dict.fromkeys(("model", "backend", "dtype", "weights", "sources", "device"), _is(str)),
    "frames": _all(int),
    "size": lambda value: value is None or (_all(int)(value) and len(value) == 2),
    "batch": _is(int),
    "versions": _is(dict),
    "options": lambda value: isinstance(value, dict) and all(map(_all(str), filter(_is(list), value.values()))),
}


def engines_root() -> Path:
    """Returns the folder that engines are built in: VSTAR_ENGINES, else one in the user's cache."""
    if named := os.environ.get("VSTAR_ENGINES"):
        return Path(named)
    if (cache := user_cache()) is None:
        raise EngineError("this user has no home directory to keep engines in; set VSTAR_ENGINES to a folder")
    return cache / "vstar-engine" / "engines"


def size_words(size: tuple[int, int] | list[int] | None) -> str:
    """Writes a size as the command line takes it: HEIGHTxWIDTH, or any."""
    return "any" if size is None else "{}x{}".format(*size)


def name_of(identity: Mapping[str, Any]) -> str:
    """Names an engine by its identity: readable first, then a hash of all of it."""
    frames = "-".join(map(str, identity["frames"])) or "any"
    if len(frames) > MAX_FRAMES_WORDS:
        frames = "{}-to-{}".format(identity["frames"][0], identity["frames"][-1])
    words = [identity["model"], identity["backend"], identity["dtype"], f"f{frames}", size_words(identity["size"])]
    return "-".join([*words, digest_of(identity)[:HASH_LENGTH]])


@dataclass(frozen=True)
class BuiltEngine:
    """A built engine whose files were checked against its manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    @staticmethod
    def open(folder: str | Path) -> "BuiltEngine":
        """Reads an engine's folder, or one of that name among the engines.

        Raises EngineError for a folder that others may write, or whose manifest or files are damaged: before any library reads
        them, since an engine is code.
        """
        path = Path(folder)
        if not os.path.isdir(path) and len(path.parts) == 1:
            path = engines_root() / path
        if not os.path.isdir(path):  # as Path.is_dir, but False for a name that is too long
            raise EngineError(
                f"there is no engine at {folder}; build one with `vstar-engine build`, list them with `vstar-engine engines`"
            )
        _check_private(path)
        manifest = read_manifest(path, KIND, EngineError, "vstar-engine build")
        if "sha256" not in manifest:
            raise EngineError(f"{path / MANIFEST} was altered: it states no sha256 of itself")
        _check_stated(path / MANIFEST, manifest)
        return BuiltEngine(path, manifest)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.manifest["identity"]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"])

    @property
    def most_frames(self) -> int:
        return max(self.identity["frames"], default=MAX_FRAMES)

    @property
    def most_side(self) -> int:
        """Returns the longest side, in pixels, of a clip whose size is free."""
        profiles = self.manifest["facts"].get("plan", {}).get("profiles", ())
        cells = [ranges[side][-1] for ranges in profiles for side in ("height", "width") if side in ranges]
        return min(cells) * model_named(self.identity["model"]).vae.factor if cells else MAX_SIDE

    def file(self, name: str) -> Path:
        """Returns the path of a file that the manifest lists; EngineError where it lists none."""
        if name not in (entry["name"] for entry in self.manifest["files"]):
            raise EngineError(f"{self.folder} holds no {name}; rebuild it: {self.command()}")
        return self.folder / name

    def command(self, **changed: Any) -> str:
        """Returns the command that builds this engine again, with `changed` parts of its identity, `weights_path` or `loras`.

        One that would be for something else leaves this one where it is.
        """
        before = {**self.manifest, **self.identity}
        made = {**before, **changed}
        stale = all(name in STALE or str(value) == str(before[name]) for name, value in changed.items())
        words = ["vstar-engine", "build", "--backend", made["backend"], "--model", made["model"]]
        if made["weights_path"]:
            words += ["--weights", str(made["weights_path"])]
        words += [f"--lora={lora}" for lora in made["loras"]]
        if made["frames"]:
            words += ["--frames", ",".join(map(str, made["frames"]))]
        words += ["--size", size_words(made["size"]), "--batch", str(made["batch"]), "--dtype", made["dtype"]]
        words += ["--device", made["device"].split()[0] if made["device"].startswith("cpu") else "cuda"]
        # each back end has its own
        for name, value in made["options"].items() if made["backend"] == self.identity["backend"] else ():
            words += [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]
        return shlex.join([*words, *(("--out", str(self.folder), "--force") if stale else ())])

    def check(self, asked: Mapping[str, Any] | None = None, **wanted: Any) -> None:
        """Raises EngineError for the first part of the identity that is not as wanted.

        It names the command that builds what is wanted, of the `weights_path` and `loras` that were `asked` for.
        """
        rebuild = f"rebuild it: {self.command(**(asked or {}), **wanted)}"
        for part, value in wanted.items():
            built = self.identity[part]
            if part == "versions":
                changed = [
                    f"{name} {built.get(name)} where {now} is installed"
                    for name, now in value.items()
                    if built.get(name) != now
                ]
                if changed:
                    raise EngineError(f"{self.folder} was built with {', '.join(changed)}; {rebuild}")
            elif built != value:
                short = (str(x)[:HASH_LENGTH] if part in ("weights", "sources") else x for x in (built, value))
                said = "{} was built for {} {}, not {}".format(self.folder, CALLED[part], *short)
                raise EngineError(f"{said}; {rebuild}")

    def check_clip(self, frames: int, size: tuple[int, int], rows: int) -> None:
        """Raises EngineError, naming what to build, for a clip (size in pixels) or a batch that the engine does not take."""
        if frames > self.most_frames:
            said = f"{self.folder} takes at most {self.most_frames} frames, got {frames}"
            longer = self.command(frames=[*self.identity["frames"], frames])
            raise EngineError(f"{said}; build one with a bucket for them: {longer}")
        built = self.identity["size"]
        if built is not None and list(built) != list(size):
            said = f"{self.folder} is for {size_words(built)}, got {size_words(size)}"
            raise EngineError(f"{said}; build one: {self.command(size=list(size))}")
        if built is None and max(size) > self.most_side:
            said = f"{self.folder} takes sides of at most {self.most_side}, got {size_words(size)}"
            raise EngineError(f"{said}; build one: {self.command(size=list(size))}")
        if rows > self.identity["batch"]:
            said = f"{self.folder} takes a batch of {self.identity['batch']}, got {rows}"
            larger = f"build one: {self.command(batch=rows)}" if rows <= MAX_BATCH else "make fewer videos at once"
            raise EngineError(f"{said}; use --no-batch-guidance or {larger}")

    def check_requests(self, *clips: Clip) -> None:
        """Raises EngineError as `check_clip` does, for clips of one shape (size filled in) that run together.

        ValueError where one wants steps that run a part of the network.
        """
        first = clips[0]
        assert first.size is not None
        if STEP_CACHE in first.sampling.fast:
            raise ValueError(f"{STEP_CACHE} needs the network in eager PyTorch, and {self.folder} can only run it whole")
        if first.plan is not None and (first.plan.one_pass or first.plan.guide):
            wanted = f"guide {first.guide}" if first.plan.guide else f"blend {first.blend}"
            raise ValueError(f"{wanted} needs the network in eager PyTorch, and {self.folder} can only run it whole")
        self.check_clip(first.pass_frames, first.size, rows_at_once(clips))


def stated_model(folder: str | Path | None) -> str | None:
    """Returns the model that an engine's manifest states, its files unchecked; None where there is none."""
    if folder is None:
        return None
    path = Path(folder) if os.path.isdir(folder) else engines_root() / folder
    try:
        return str(json.loads((path / MANIFEST).read_text())["identity"]["model"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _check_private(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise EngineError(
            f"{folder} belongs to another user, number {status.st_uid}; an engine is code: run as that user, build your own, "
            f"or trust this one by taking it over: chown -R {os.getuid()} {shlex.quote(str(folder))}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{folder} can be written by other users; an engine is code: chmod {PRIVATE:o} {shlex.quote(str(folder))}"
        )


def _check_stated(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises EngineError for a manifest that lacks something an engine's states, or has another kind of thing there."""
    wrong = [name for name, right in STATED.items() if not right(manifest.get(name, ...))]
    if not wrong:
        wrong = [f"identity's {name}" for name, right in SHAPED.items() if not right(manifest["identity"].get(name, ...))]
    if wrong:
        raise EngineError(
            f"{path} does not state what an engine's does: {', '.join(wrong)} missing, or of another kind; "
            "build the engine again with `vstar-engine build --force`"
        )


def engines(root: Path) -> Iterator[BuiltEngine | EngineError]:
    """Yields each engine below `root` by name, or what is wrong with it."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                yield BuiltEngine.open(folder)
            except EngineError as error:
                yield error


def remove(folder: str | Path) -> Path:
    """Removes an engine's folder; EngineError for anything else."""
    path = Path(folder)
    if not path.is_dir() and len(path.parts) == 1:
        path = engines_root() / path
    if not path.is_dir():
        raise EngineError(f"there is no engine at {folder}; `vstar-engine engines` lists them")
    check_engine(path)
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror or error}") from error
    return path


def check_engine(path: Path) -> None:
    """Raises EngineError for what is no engine, damaged or whole, and so must not be removed as one."""
    if not (path / MANIFEST).is_file():
        raise EngineError(f"{path} is no engine: it is no folder with a {MANIFEST}")
    if f'"{KIND}"' not in (path / MANIFEST).read_text(errors="replace"):
        raise EngineError(f"{path} is no engine: its {MANIFEST} describes something else")

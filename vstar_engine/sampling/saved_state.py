"""Checkpoints of a video that is being sampled, so that a job of hours survives its process.

One safetensors file holds the tensors of a trajectory, the state of its random generator, the step, and what they belong to.
It replaces the one before, whole or not at all. Continued on the same kind of machine, a video has the very bytes that it
would have had.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vstar_engine.artifacts.files import write_aside
from vstar_engine.config.sampling import STEP_CACHE
from vstar_engine.config.windows import FIFO
from vstar_engine.kernels.source_hash import KERNELS, hash_of, modules
from vstar_engine.machine.device import described

from .batch import Batch, BatchRow
from .ddim import Trajectory
from .windows import WindowedDenoiser

log = logging.getLogger(__name__)

KIND, VERSION = "vstar-engine checkpoint of a video", 1
GENERATOR = "generator"
# rooms whose code decides the bytes of a video
ROOMS = (KERNELS, "vstar_engine.networks", "vstar_engine.sampling", "vstar_engine.prompting")
# steps between two checkpoints of a clip in windows
EVERY = 2


@cache
def code_hash() -> str:
    """Returns the sha256 of the code that samples."""
    return hash_of(source for room in ROOMS for source in modules(room))


@dataclass(frozen=True)
class SavedState:
    """A checkpoint: the steps that are done, the tensors of a row, and what it belongs to.

    `made_of` names the request, the weights and the code, which must be the same to continue; `machine` the device and what
    else decides the last bits of a result.
    """

    done: int
    tensors: Mapping[str, Tensor]
    made_of: dict[str, Any]
    machine: dict[str, Any]


def made_of(row: BatchRow, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a row's checkpoint belongs to, as plain JSON values; `identity` names the model and its weights."""
    return json.loads(json.dumps({"request": asdict(row.request), "code": code_hash(), **identity}))


def machine_of(batch: Batch) -> dict[str, Any]:
    """Returns what decides the last bits of a batch's results beside its request, weights and code."""
    wide = batch.denoiser.at_once if isinstance(batch.denoiser, WindowedDenoiser) else 1
    host = {"device": described(batch.rows[0].latents.device), "torch": torch.__version__}
    return {**host, "threads": torch.get_num_threads(), "windows_at_once": wide}


def save(path: Path, row: BatchRow, done: int, identity: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Writes a checkpoint of a row after `done` steps; the file is whole or the one before."""
    assert row.generator is not None
    tensors = {GENERATOR: row.generator.get_state()}
    for one in fields(Trajectory):
        if isinstance(value := getattr(row, one.name), Tensor):
            tensors[one.name] = value.cpu().contiguous()
    about = {"version": VERSION, "done": done, "made_of": made_of(row, identity), "machine": dict(machine)}
    with write_aside(path) as aside:
        try:
            save_file(tensors, aside, {"kind": KIND, "about": json.dumps(about)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read(path: Path) -> SavedState:
    """Reads a checkpoint; ValueError for a file that is absent, cut short, or something else. The file stays."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path} to resume from; leave out --resume to begin")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        if metadata.get("kind") != KIND:
            raise ValueError(f"{path} is no checkpoint of a video; leave out --resume to begin")
        about = json.loads(metadata["about"])
        if about["version"] != VERSION:
            raise ValueError(f"{path} is a checkpoint of version {about['version']}, this engine reads {VERSION}")
        return SavedState(int(about["done"]), tensors, dict(about["made_of"]), dict(about["machine"]))
    except (SafetensorError, OSError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint and is kept ({error}); leave out --resume to begin") from error


@dataclass(frozen=True)
class Checkpoint:
    """Where a video's checkpoint is, after how many steps it is written, and whether to begin from it."""

    path: Path
    every: int = EVERY
    resume: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a checkpoint is written every 1 or more steps, got {self.every}")

    def check(self) -> None:
        """Raises ValueError where the checkpoint to begin from cannot be read, before a model is loaded."""
        if self.resume:
            read(self.path)

    def begin(self, batch: Batch, identity: Mapping[str, Any]) -> None:
        """Sets a fresh batch of one video to the checkpoint, where that is asked for; raises as
        `read` and `restore` do."""
        if batch.cache is not None:
            raise ValueError(f"{STEP_CACHE} keeps features from step to step, so it does not compose with checkpoints")
        if batch.rows[0].request.blend == FIFO and batch.rows[0].request.plan is not None:
            raise ValueError(f"a checkpoint does not hold the queue of blend {FIFO}: give --checkpoint-every 0")
        if self.resume:
            saved = read(self.path)
            restore(saved, batch, identity)
            machine = machine_of(batch)
            if saved.machine != machine:
                log.warning("the checkpoint is of %s, here is %s: equal to rounding, not to the bit", saved.machine, machine)

    def keep(self, batch: Batch, identity: Mapping[str, Any]) -> None:
        """Writes the checkpoint where it is due: every so many steps, and after the last."""
        if batch.done % self.every == 0 or batch.done == batch.steps:
            save(self.path, batch.rows[0], batch.done, identity, machine_of(batch))


def restore(saved: SavedState, batch: Batch, identity: Mapping[str, Any]) -> None:
    """Sets a fresh batch of one video to a checkpoint; ValueError where it is one of another video or engine."""
    (row,) = batch.rows
    wanted = made_of(row, identity)
    other = [name for name in wanted if saved.made_of.get(name) != wanted[name]]
    if other == ["request"]:
        before, now = saved.made_of["request"], wanted["request"]
        changed = ", ".join(name for name in now if before.get(name, ...) != now[name])
        raise ValueError(f"the checkpoint is of another request ({changed}); give the same options, or leave out --resume")
    if other:
        raise ValueError(f"the checkpoint was made with another {', '.join(other)}; leave out --resume to begin")
    assert row.generator is not None
    row.generator.set_state(saved.tensors[GENERATOR])
    for one in fields(Trajectory):
        held = getattr(row, one.name)
        if one.name in saved.tensors:
            # noise waits on the CPU
            device = "cpu" if one.name == "drawn" else row.latents.device
            value = saved.tensors[one.name].to(device)
            setattr(row, one.name, value.pin_memory() if one.name == "drawn" and row.latents.is_cuda else value)
        elif isinstance(held, Tensor):
            setattr(row, one.name, None)
    batch.done = saved.done

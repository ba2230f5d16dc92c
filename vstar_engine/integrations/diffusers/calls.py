"""Reads from a denoiser's calls what its attentions are not told: the frames, their tokens, the step and the text."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .denoisers import WAN, Denoiser

ARGUMENTS = ("sample", "timestep", "encoder_hidden_states")
WAN_ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states")
# a timestep -> the step, counted from 0, of how many
Steps = Callable[[Any], tuple[int, int]]


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: latent frames, tokens a frame after patching, the step (counted from 0) of how many."""

    frames: int
    tokens: int
    step: int
    steps: int
    device: torch.device


class SchedulerOf:
    """The scheduler that a pipeline has now, whichever it had when the dial was put on."""

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @property
    def timesteps(self) -> Any:
        return self.pipe.scheduler.timesteps


class SchedulerSteps:
    """The step of a timestep, by a scheduler's list of them."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self._known: tuple[Any, list[float]] = (None, [])

    def __call__(self, timestep: Any) -> tuple[int, int]:
        """Returns the step, counted from 0, of how many. Raises ValueError for a timestep that the scheduler does not have."""
        # tokens of a given frame have the timestep 0
        now = float(timestep.max()) if torch.is_tensor(timestep) else float(timestep)
        if self._known[0] is not self.scheduler.timesteps:
            times = self.scheduler.timesteps
            # a scheduler of second order names a timestep twice
            self._known = times, torch.unique_consecutive(torch.as_tensor(times).float()).tolist()
        times = self._known[1]
        index = min(range(len(times)), key=lambda i: abs(times[i] - now))
        gap = min((abs(a - b) for a, b in pairwise(times)), default=2.0)
        if abs(times[index] - now) > gap / 2:
            raise ValueError(f"the denoiser was called at timestep {now}, which is none of the scheduler's: {times}")
        return index, len(times)


class Calls:
    """A forward pre-hook on a denoiser; `listener` is told of every call, and may return another text for it.

    `scheduler` says the step, or is a function that returns it and the number of steps for a timestep.
    """

    def __init__(self, denoiser: Denoiser, scheduler: Any, listener: Callable[[Call, Tensor], Tensor | None]):
        self.denoiser, self.listener = denoiser, listener
        self.step_of: Steps = scheduler if callable(scheduler) else SchedulerSteps(scheduler)
        self._handle = denoiser.module.register_forward_pre_hook(self._before, with_kwargs=True)

    def off(self) -> None:
        """Removes the hook."""
        self._handle.remove()

    # a step is data of the loop around the network: nothing of it belongs into a traced graph
    @torch.compiler.disable
    def _before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        names = WAN_ARGUMENTS if self.denoiser.family == WAN else ARGUMENTS
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        latents, text = given[names[0]], given[names[2]]
        t, h, w = module.config.patch_size if self.denoiser.family == WAN else (1, 1, 1)
        frames, tokens = latents.shape[2] // t, (latents.shape[3] // h) * (latents.shape[4] // w)
        call = Call(frames, tokens, *self.step_of(given["timestep"]), latents.device)
        other = self.listener(call, text)
        if other is None:
            return None
        if len(args) > 2:
            return (*args[:2], other, *args[3:]), kwargs
        return args, {**kwargs, names[2]: other}

"""Step caching (arXiv 2312.00858): what the network's finest level takes from the deeper ones is kept for the next step.

From one sampling step to the next the deep features change little, and most of the work is theirs. A whole step is exact to the
bit and keeps them, for each guidance branch of each video; the step after it runs only the blocks around them.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import UNetSpec

# the levels, from the finest, that every step runs
FRESH_LEVELS = 1


@dataclass
class Deep:
    """What the last `stages` output blocks take from the ones before: kept by a whole forward, used by one that has it."""

    stages: int
    features: Tensor | None = None


class StepCache:
    """Runs a network whole, or on the deep features that each branch of a batch had when it last ran whole."""

    def __init__(self, unet: Callable[..., Tensor], spec: UNetSpec):
        self.unet = unet
        self.stages = FRESH_LEVELS * (spec.num_res_blocks + 1)
        self.held: dict[tuple[Hashable, ...], Tensor] = {}

    def __call__(self, branches: Sequence[Hashable], whole: bool, *inputs: Any) -> Tensor:
        """Gives the noise of rows that go by the names in `branches`."""
        names = tuple(branches)
        if not whole:
            return self.unet(*inputs, Deep(self.stages, self._features(names)))
        # what these branches had is not kept beside what they get
        self.held = {others: held for others, held in self.held.items() if not {*others} & {*names}}
        deep = Deep(self.stages)
        noise = self.unet(*inputs, deep)
        assert deep.features is not None
        self.held[names] = deep.features
        return noise

    def _features(self, names: tuple[Hashable, ...]) -> Tensor:
        """Gives the features of branches, put together anew where they did not run together."""
        if names in self.held:
            return self.held[names]
        single = {name: part for ran, held in self.held.items() for name, part in zip(ran, held.chunk(len(ran)), strict=True)}
        return torch.cat([single[name] for name in names])

"""Step caching (arXiv 2312.00858): what the network's finest level takes from the deeper ones is kept for the next step.

From one sampling step to the next the deep features change little, and most of the work is theirs. A whole step is exact to the
bit and keeps them, for each guidance branch of each video; the step after it runs only the blocks around them.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from vstar_engine.config.models import UNetSpec
from vstar_engine.networks.precomputed import CachedFeatures

# the levels, from the finest, that every step runs
FRESH_LEVELS = 1


class StepCache:
    """The deep features that each branch of a batch had when the network last ran whole for it."""

    def __init__(self, spec: UNetSpec):
        self.stages = FRESH_LEVELS * (spec.num_res_blocks + 1)
        self.held: dict[tuple[Hashable, ...], Tensor] = {}

    def features(self, branches: Sequence[Hashable], whole: bool) -> CachedFeatures:
        """Returns what a forward of rows that go by the names in `branches` takes: with their features unless it runs whole."""
        names = tuple(branches)
        if not whole:
            return CachedFeatures(self.stages, self._joined(names))
        # what these branches had is not kept beside what they get
        self.held = {others: held for others, held in self.held.items() if not {*others} & {*names}}
        return CachedFeatures(self.stages)

    def keep(self, branches: Sequence[Hashable], features: Tensor) -> None:
        """Keeps the features of a forward that ran whole."""
        self.held[tuple(branches)] = features

    def _joined(self, names: tuple[Hashable, ...]) -> Tensor:
        """Returns the features of branches, put together anew where they did not run together."""
        if names in self.held:
            return self.held[names]
        single = {name: part for ran, held in self.held.items() for name, part in zip(ran, held.chunk(len(ran)), strict=True)}
        return torch.cat([single[name] for name in names])

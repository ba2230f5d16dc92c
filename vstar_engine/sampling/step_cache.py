"""Step caching (arXiv 2312.00858): the input of the network's finest level from the deeper levels is reused in the next step.

Deep features change little between sampling steps and take most of the work. A full step is exact to the bit and stores the
features of each guidance branch of each video. The step after it runs only the finest level on them.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from vstar_engine.config.models import UNetSpec
from vstar_engine.networks.precomputed import CachedFeatures

# the levels, from the finest, that every step runs
FRESH_LEVELS = 1


class StepCache:
    """The deep features of each branch of a batch, from its last full step."""

    def __init__(self, spec: UNetSpec):
        self.stages = FRESH_LEVELS * (spec.num_res_blocks + 1)
        self.held: dict[tuple[Hashable, ...], Tensor] = {}

    def features(self, branches: Sequence[Hashable], whole: bool) -> CachedFeatures:
        """Returns the `cached` argument of a forward of these branches: with stored features, or empty for a full step."""
        names = tuple(branches)
        if not whole:
            return CachedFeatures(self.stages, self._joined(names))
        # the old features of these branches are freed before new ones are stored
        self.held = {others: held for others, held in self.held.items() if not {*others} & {*names}}
        return CachedFeatures(self.stages)

    def keep(self, branches: Sequence[Hashable], features: Tensor) -> None:
        """Stores the features of a full forward."""
        self.held[tuple(branches)] = features

    def _joined(self, names: tuple[Hashable, ...]) -> Tensor:
        """Returns the features of branches, concatenated where they were not stored together."""
        if names in self.held:
            return self.held[names]
        single = {name: part for ran, held in self.held.items() for name, part in zip(ran, held.chunk(len(ran)), strict=True)}
        return torch.cat([single[name] for name in names])

"""Calls on tensors that stay where they are, recorded as CUDA graphs, and the few shapes that are kept.

A call's first run is a plain one: it loads kernels, and libraries choose theirs. The second is captured, and later ones replay
that. What a recorded call reads and writes must keep its address.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

# shapes that are kept where fewer were warmed; who mixes more starts the oldest anew
SHAPES = 8

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recording(Generic[V]):
    """One call that gives tensors, by a CUDA graph from its second run on; not `records`: plainly every time.

    Recordings that share a `pool` share the memory of what they compute: they run one at a time, and what one gives is taken
    before another runs. `nbytes` is by how much a recording made the pool grow.
    """

    def __init__(self, call: Callable[[], V], device: torch.device, records: bool = True, pool: Any = None):
        self.call, self.device, self.records, self.pool = call, device, records, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: V | None = None
        self.runs = self.nbytes = 0

    def __call__(self) -> V:
        """Runs on the current stream; a later run may write the same memory."""
        self.runs += 1
        # a capture that failed is not tried again
        if self.records and self.runs == 2:
            self._capture()
        if self.graph is None:
            return self.call()
        assert self.result is not None
        self.graph.replay()
        return self.result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # no graph or tensor may be destroyed during a capture
        gc.collect()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            # other threads may ask the device for memory meanwhile
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                self.result = self.call()
            self.nbytes = max(0, torch.cuda.memory_reserved() - before)
        self.graph = graph


_growing = False


@contextmanager
def growing() -> Iterator[None]:
    """What comes meanwhile makes nothing give way, and from then on so much is kept: for warming up."""
    global _growing
    before, _growing = _growing, True
    try:
        yield
    finally:
        _growing = before


class Recent(OrderedDict[K, V]):
    """What was used last: `SHAPES` at most, or as many as there were while it was `growing`."""

    most = SHAPES

    def take(self, key: K, make: Callable[[], V]) -> V:
        """Returns what is kept under a key, made now where there is nothing; what was not used for longest makes room first."""
        if key not in self:
            if _growing:
                self.most = max(self.most, len(self) + 1)
            while len(self) >= self.most:
                self.popitem(last=False)
            self[key] = make()
        self.move_to_end(key)
        return self[key]

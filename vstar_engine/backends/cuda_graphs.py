"""CUDA graphs of calls on tensors with fixed addresses, and a cache of the most recently used ones.

A call's first run is eager: it loads kernels and lets libraries choose theirs. The second run is captured, and later ones
replay it. Every tensor that a recorded call reads or writes must keep its address.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

# recordings that are kept, unless more were warmed; a further shape evicts the least recently used
SHAPES = 8

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recording(Generic[V]):
    """A call that returns tensors, replayed as a CUDA graph from its second run on; run eagerly unless `records`.

    Recordings that share a `pool` share memory: they run one at a time, and the result of one must be read before another runs.
    `nbytes` counts the bytes that a recording added to the pool.
    """

    def __init__(self, call: Callable[[], V], device: torch.device, records: bool = True, pool: Any = None):
        self.call, self.device, self.records, self.pool = call, device, records, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: V | None = None
        self.runs = self.nbytes = 0

    def __call__(self) -> V:
        """Runs on the current stream; a later run may write the same memory."""
        self.runs += 1
        # a failed capture is not retried
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
            # other threads may allocate on the device during the capture
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                self.result = self.call()
            self.nbytes = max(0, torch.cuda.memory_reserved() - before)
        self.graph = graph


_growing = False


@contextmanager
def growing() -> Iterator[None]:
    """Disables eviction inside the block, so that every warmed shape stays captured."""
    global _growing
    before, _growing = _growing, True
    try:
        yield
    finally:
        _growing = before


class Recent(OrderedDict[K, V]):
    """A cache of the `SHAPES` most recently used values, or of as many as it had while `growing`."""

    most = SHAPES

    def take(self, key: K, make: Callable[[], V]) -> V:
        """Returns the value of a key, made by `make` where it is missing, after evicting the least recently used if full."""
        if key not in self:
            if _growing:
                self.most = max(self.most, len(self) + 1)
            while len(self) >= self.most:
                self.popitem(last=False)
            self[key] = make()
        self.move_to_end(key)
        return self[key]

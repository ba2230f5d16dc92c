"""A stand-in for CUDA graphs on a CPU: operators are written down while they are captured, and run again on the same memory."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operators of a capture, the arguments they had, and the tensors they made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        fresh = [x if x.untyped_storage()._cdata not in given else None for x in made]
        self.calls.append((func, args, kwargs or {}, fresh))
        return out


class Graph:
    """As `torch.cuda.CUDAGraph`: a capture computes nothing that could be read, a replay reads and writes fixed memory."""

    captures = replays = 0

    def replay(self):
        type(self).replays += 1
        for func, args, kwargs, fresh in self.tape.calls:
            made = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for mine, now in zip(fresh, made, strict=True):
                if mine is not None:
                    mine.copy_(now)


@contextmanager
def captured(graph, pool=None, stream=None, capture_error_mode="global"):
    assert capture_error_mode == "thread_local"
    with Tape() as tape:
        yield
    graph.tape = tape
    type(graph).captures += 1
    for *_, fresh in tape.calls:
        for x in fresh:
            if x is not None and x.is_floating_point():
                x.fill_(torch.nan)


class Reserved:
    """What the allocator holds: a capture lets it grow by a mebibyte."""

    def __init__(self):
        self.calls = 0

    def __call__(self, device=None):
        self.calls += 1
        return (self.calls // 2) * 2**20


def install(monkeypatch):
    """Puts the stand-ins in the place of PyTorch's; returns the class of graphs, which counts its captures and replays."""
    kind = type("CountedGraph", (Graph,), {})
    for name, stand_in in {
        "CUDAGraph": kind,
        "graph": captured,
        "Stream": lambda device: None,
        "device": lambda device: nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "memory_reserved": Reserved(),
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return kind

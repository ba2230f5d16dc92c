"""What each way of temporal attention allocates at its peak, computed: its operators run on tensors without data."""

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vstar_engine.bench.harness.rows import ABSENT, ResultRow
from vstar_engine.errors import MissingLibrary
from vstar_engine.machine.memory import LiveBytes

from .attention_providers import PROVIDERS, Attention, Problem

SUITE = "memory"


def peak(attention: Attention, shape: tuple[int, ...], dtype: torch.dtype, layout: str, sigma: float) -> int:
    """Counts the bytes of what operators make, without their scratch, on a problem of (B, T, P, heads, head_dim)."""
    # the published path makes its bias by NumPy, of real memory
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        call = attention.prepare(Problem.random(shape, dtype, torch.device("cpu"), layout, sigma))
        with LiveBytes() as live:
            call()
    return live.peak


def row(name: str, shape: tuple[int, ...], dtype: torch.dtype, case: dict[str, object], sigma: float) -> ResultRow:
    """Makes a provider's row of its peak at a case of a contest."""
    said = {"op": "temporal_attention", **case, "shape": "x".join(map(str, shape))}
    found = ResultRow(SUITE, said, name, str(dtype)[6:], "computed")
    try:
        return replace(found, numbers={"peak_bytes": peak(PROVIDERS[name], shape, dtype, str(case["layout"]), sigma)})
    except MissingLibrary as missing:
        return replace(found, status=ABSENT, note=str(missing))

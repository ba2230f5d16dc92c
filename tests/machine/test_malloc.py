"""Pages that stay with the process: large tensors stop being mapped afresh, and go back when asked."""

import ctypes
import subprocess
import sys
import types

import pytest

from vstar_engine.machine import malloc

# settings hold for the whole process, so the measurement has one of its own
MEASURE = """
import resource, sys, torch
from vstar_engine.machine import malloc
if sys.argv[1] == "kept":
    assert malloc.keep_pages()
layer = torch.nn.Conv2d(64, 64, 1).to(memory_format=torch.channels_last).requires_grad_(False)
x = torch.ones(4, 64, 256, 256).contiguous(memory_format=torch.channels_last)
def rounds(count):
    for _ in range(count):
        layer(layer(x) + x).narrow(1, 0, 32).contiguous()
rounds(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(4)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
held = resident()
malloc.give_back()
print(faults, held - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs a C library with mallopt")
def test_kept_pages_are_not_mapped_again_and_go_back():
    def measured(how):
        done = subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True)
        return map(int, done.stdout.split())

    (faults, _), (kept_faults, given_back) = measured("default"), measured("kept")
    # a round makes 224 MiB: by 2 MiB pages at the least, where the system hands them out unasked
    assert faults >= 4 * 112
    assert kept_faults < faults / 4
    assert given_back > 64 * 2**20


def test_without_mallopt_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert malloc.keep_pages() is False
    malloc.give_back()

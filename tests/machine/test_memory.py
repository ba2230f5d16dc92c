"""The plan follows the architecture, is near what a run really takes, and its advice fits."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vstar_engine.config.models import MODELS
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling
from vstar_engine.errors import MemoryShortage
from vstar_engine.machine import memory
from vstar_engine.machine.memory import Footprint, activation_bytes, bound_bytes, check, weight_bytes
from vstar_engine.networks.vae import CHUNK, Vae

MINI = MODELS["mini"]
CPU = torch.device("cpu")

MEASURE = """
import sys, torch
from vstar_engine.config.models import MODELS
from vstar_engine.networks.unet import UNet
spec, frames = MODELS["mini"], int(sys.argv[1])
torch.set_grad_enabled(False)
net = UNet(spec.unet).eval()
def run(t):
    net(torch.randn(2, 4, t, 24, 32), torch.ones(2, 1), torch.randn(2, t, 77, 64), torch.ones(2), torch.rand(1, 3, t))
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
run(1)
before = kib("VmRSS")
run(frames)
print((kib("VmHWM") - before) * 1024)
"""


def footprint(frames=64, size=(96, 128), dtype=torch.float32, batch=2):
    return Footprint(MINI, frames, *size, dtype, batch)


def test_weights_are_counted_exactly():
    spec = MODELS["videocrafter2"]
    # the official file less encoder, quant_conv, last text block, projection, logit scale and schedule buffers
    assert weight_bytes(spec, torch.float16) == 2 * sum(
        p.numel() for module in memory_modules(spec) for p in module.parameters()
    )
    assert 3.5e9 < weight_bytes(spec, torch.float16) < 3.7e9


def memory_modules(spec):
    from vstar_engine.networks.text_encoder import TextTower
    from vstar_engine.networks.unet import UNet
    from vstar_engine.networks.vae import Vae

    with torch.device("meta"):
        return UNet(spec.unet), Vae(spec.vae, encoder=False), TextTower(spec.text)


@pytest.mark.parametrize("model", MODELS)
def test_no_generation_holds_more_than_the_bound(model):
    spec = MODELS[model]
    # a streaming model's calls are of a whole chunk
    fewest = 1 if spec.streaming is None else spec.streaming.chunk
    for frames, batch, dtype in ((fewest, 1, torch.bfloat16), (16, 2, torch.float32), (16, 1, torch.float16)):
        request = Footprint(spec, frames, *spec.size, dtype, batch)
        assert activation_bytes(request) < bound_bytes(request)


def test_what_surely_fits_is_not_counted(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**40)
    activation_bytes.cache_clear()
    check(footprint(), torch.device("cpu"), loaded=True)
    assert activation_bytes.cache_info().misses == 0


def test_memory_grows_with_frames_size_dtype_and_batch():
    base = activation_bytes(footprint())
    assert activation_bytes(footprint(frames=128)) > base
    assert activation_bytes(footprint(size=(192, 128))) > base
    assert activation_bytes(footprint(batch=1)) < base
    assert activation_bytes(footprint(dtype=torch.float16)) < base


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's peak memory is read from Linux")
def test_a_run_takes_no_more_than_planned_and_not_far_less():
    frames = 48
    out = subprocess.run([sys.executable, "-c", MEASURE, str(frames)], capture_output=True, text=True, check=True)
    measured, planned = int(out.stdout), activation_bytes(footprint(frames=frames, size=(192, 256)))
    assert measured < planned < 2 * measured + memory.WORKSPACE


@pytest.mark.parametrize("loaded", [True, False], ids=["weights there", "weights to come"])
@pytest.mark.parametrize(
    "free", [500, 900, *(pytest.param(mib, marks=pytest.mark.slow) for mib in (620, 1500))], ids=lambda mib: f"{mib} MiB"
)
def test_advice_fits(free_memory, free, loaded):
    free_memory(free * 2**20)
    asked = footprint(frames=512, size=(192, 256))
    with pytest.raises(MemoryShortage) as shortage:
        check(asked, CPU, loaded)
    advice = str(shortage.value).rpartition("; ")[2]
    frames = int(match[1]) if (match := re.search(r"(\d+) frames", advice)) else 512
    if "choose a smaller" in advice:
        frames, size = 1, (32, 32)
    else:
        size = (192, 256)
    dtype = torch.float16 if "float16" in advice else torch.float32
    check(footprint(frames=frames, size=size, dtype=dtype, batch=1), CPU, loaded)


def test_a_model_that_cannot_fit_at_all(free_memory):
    free_memory(2**20)
    with pytest.raises(MemoryShortage, match="the model itself does not fit"):
        check(footprint(), CPU, loaded=False)


def test_guidance_one_needs_one_row():
    request = Request(("a",), size=(96, 128), sampling=Sampling(guidance=1.0))
    assert Footprint.of(request, MINI, torch.float32).batch == 1
    assert Footprint.of(Request(("a",), size=(96, 128)), MINI, torch.float32).batch == 2


def test_planning_leaves_the_default_dtype_alone():
    activation_bytes(footprint(frames=3, dtype=torch.bfloat16))
    assert torch.get_default_dtype() == torch.float32


def test_frames_are_decoded_at_once_as_far_as_they_fit():
    one = memory.frame_bytes(MINI, 96, 128, torch.float32)
    assert one == 2 * memory.frame_bytes(MINI, 96, 128, torch.float16)

    def at_once(frames, slack=0):
        free = int(memory.MARGIN * frames * one) + memory.WORKSPACE + slack
        return memory.frames_within(MINI, 96, 128, torch.float32, free)

    found = {(1, -99): 0, (1, 9): 1, (5, -99): 4, (5, 9): 5, (CHUNK, 9): CHUNK, (100, 0): CHUNK}
    assert {asked: at_once(*asked) for asked in found} == found
    assert memory.frames_within(MINI, 96, 128, torch.float32, 0) == 0


@torch.no_grad()
def test_frames_decoded_together_take_what_was_planned():
    vae = Vae(MINI.vae, encoder=False).eval()
    with memory.LiveBytes() as live:
        for _ in vae.decoded(torch.randn(1, 4, 5, 4, 4), 5):
            pass
    assert live.peak == pytest.approx(5 * memory.frame_bytes(MINI, 32, 32, torch.float32), rel=0.1)


def test_windows_take_the_memory_of_one_and_the_clips_latents():
    """At 1,200 frames at most 1.15 times that of one window, beside the latents."""
    one = activation_bytes(Footprint.of(Request(("a",), 64, size=(96, 128)), MINI, torch.float32))
    asked = Request(("a", "b"), 1200, size=(96, 128), window=64, overlap=16)
    long = Footprint.of(asked, MINI, torch.float32)
    latents = memory.LATENTS * 1200 * 4 * 12 * 16 * 4
    assert (long.frames, long.clip) == (64, 1200)
    assert activation_bytes(long) - latents <= 1.15 * one

"""The C++ kernel against float64: forms, lengths, widths, dtypes, strides and every instruction set this machine runs."""

import _ctypes
import ctypes
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from golden.load_golden import Golden
from torch import Tensor

from support.accuracy import assert_as_accurate, relative_error
from support.pairwise import pairwise
from vstar_engine.kernels import temporal_attention as module
from vstar_engine.kernels.cpu import arguments, calls, library
from vstar_engine.sampling.tar import toeplitz

pytestmark = pytest.mark.usefixtures("poisoned_memory")
PRESENT, WHY = library.status()
ISAS = library._load().isas if PRESENT else ("baseline",)
needs_library = pytest.mark.skipif(not PRESENT, reason=WHY)
GOLDEN = Golden(str(Path(__file__).parents[1] / "golden"))
GOLDEN_CASES = GOLDEN.cases("tar_attention") + GOLDEN.cases("tar_attention_generated")

FRAMES = (1, 2, 7, 16, 17, 31, 48, 64, 65, 100, 127, 128, 129, 200, 256, 300, 512)
AXES = {
    "frames": FRAMES,
    "head_dim": (8, 16, 40, 64, 80, 128),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "isa": ISAS,
    "logits": ("ordinary", "negative", "mixed", "thousands"),
    "g": ("gaussian", "zero", "negative", "noise", "per item"),
    "keys": ("same", "more", "fewer", "dense"),
    "layout": ("fused", "separate", "frames last"),
}


def make(frames: int, head_dim: int, dtype: torch.dtype, logits: str, g: str, keys: str, layout: str) -> tuple[Tensor, ...]:
    """Builds q, k, v and the bias of one row of the table: two batch items, three positions, two heads."""
    gen = torch.Generator().manual_seed(frames * 131 + head_dim)
    batch, positions, heads = 2, 3, 2
    n_keys = {"more": frames + 3, "fewer": (frames + 1) // 2}.get(keys, frames)
    if layout == "fused" and n_keys == frames:
        q, k, v = torch.randn(batch, frames, positions, 3, heads, head_dim, generator=gen).to(dtype).unbind(3)
    elif layout == "frames last":
        q, k, v = (
            torch.randn(batch, positions, heads, n, head_dim, generator=gen).to(dtype).permute(0, 3, 1, 2, 4)
            for n in (frames, n_keys, n_keys)
        )
    else:
        q, k, v = (torch.randn(batch, n, positions, heads, head_dim, generator=gen).to(dtype) for n in (frames, n_keys, n_keys))
    if logits == "negative":
        q, k = q.abs(), -k.abs()
    elif logits == "mixed":
        q[:, ::2] = q[:, ::2].abs()
        k = -k.abs()
        q[:, 1::2] *= -1
    elif logits == "thousands":
        q = q * 60
        k = k * 30
    if keys == "dense":
        return q, k, v, torch.randn(1 if g != "per item" else batch, frames, n_keys, generator=gen)
    g_of = {
        "gaussian": lambda: toeplitz(frames, 4.0)[None],
        "zero": lambda: torch.zeros(1, frames),
        "negative": lambda: -toeplitz(frames, 2.0)[None],
        "noise": lambda: torch.randn(1, frames, generator=gen),
        "per item": lambda: torch.stack([toeplitz(frames, 1.0), 0.5 * toeplitz(frames, 8.0)]),
    }[g]
    return q, k, v, g_of()


def near_tie_slack(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, exact: Tensor) -> float:
    """What one float32 rounding of the largest logit of each row can move the output, relative to it.

    With logits in the thousands almost every row is one-hot, and the error is that of the few rows with two nearly equal keys:
    one sample each of rounding luck, for us and for PyTorch.
    """
    phi = q.double().permute(0, 2, 3, 1, 4) @ k.double().permute(0, 2, 3, 4, 1) * q.shape[-1] ** -0.5
    phi = phi + phi.amax(dim=-1, keepdim=True) * dense[:, None, None]
    step = torch.finfo(torch.float32).eps * phi.abs().amax(dim=-1)
    probs = phi.softmax(dim=-1)
    largest = v.double().permute(0, 2, 3, 1, 4).abs().amax(dim=-2, keepdim=True)
    moved = (step * (probs * (1 - probs)).sum(dim=-1))[..., None] * largest
    return float(moved.norm() / exact.norm())


def check(monkeypatch, frames, head_dim, dtype, isa, logits, g, keys, layout) -> None:
    monkeypatch.setenv("VSTAR_CPU_ISA", isa)
    q, k, v, bias = make(frames, head_dim, dtype, logits, g, keys, layout)
    dense = bias if bias.dim() == 3 else module.toeplitz_bias(bias, frames, k.shape[1])
    exact = module.temporal_attention_dense_ref(q.double(), k.double(), v.double(), dense)
    eager = module.temporal_attention_dense_ref(q, k, v, dense)
    ours = (module.temporal_attention_dense if bias.dim() == 3 else module.temporal_attention)(q, k, v, bias)
    assert ours.is_contiguous()
    slack = near_tie_slack(q, k, v, dense, exact) if logits == "thousands" else 0.0
    assert_as_accurate(ours, eager, exact, slack)


def row_id(row: tuple) -> str:
    return "-".join(str(x).removeprefix("torch.").replace(" ", "_") for x in row)


@needs_library
@pytest.mark.parametrize("row", [tuple(case.values()) for case in pairwise(AXES)], ids=row_id)
def test_as_accurate_as_eager(row, monkeypatch):
    check(monkeypatch, *row)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("logits", AXES["logits"])
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("isa", ISAS)
def test_as_accurate_as_eager_everywhere(isa, frames, logits, monkeypatch):
    """Every length, width, dtype, instruction set and kind of logits; the biases, key counts and layouts in turn."""
    turns = itertools.cycle(itertools.product(AXES["g"], AXES["keys"], AXES["layout"]))
    for head_dim, dtype in itertools.product(AXES["head_dim"], AXES["dtype"]):
        for g, keys, layout in itertools.islice(turns, 2):
            check(monkeypatch, frames, head_dim, dtype, isa, logits, g, keys, layout)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [1, 3, 33, 127])
def test_odd_head_widths(isa, head_dim, monkeypatch):
    check(monkeypatch, 19, head_dim, torch.float32, isa, "ordinary", "gaussian", "same", "fused")


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frames", [5, 65])
def test_nan_query_spoils_its_row_only(frames, dtype, isa, monkeypatch):
    monkeypatch.setenv("VSTAR_CPU_ISA", isa)
    q, k, v, g = make(frames, 16, dtype, "ordinary", "gaussian", "same", "fused")
    clean = module.temporal_attention(q, k, v, g)
    q[1, 3, 2, 1, 5] = float("nan")
    spoiled = module.temporal_attention(q, k, v, g)
    row = torch.zeros_like(clean, dtype=torch.bool)
    row[1, 3, 2, 1] = True
    assert spoiled[row].isnan().all()
    assert torch.equal(spoiled[~row], clean[~row])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_output_is_written_and_nothing_else(dtype, monkeypatch):
    """The output sits in memory with a margin on both sides."""
    q, k, v, g = make(31, 40, dtype, "ordinary", "gaussian", "same", "fused")
    margin = 256
    memory = torch.full((q.numel() + 2 * margin,), float("nan"), dtype=dtype)
    monkeypatch.setattr(calls.torch, "empty", lambda shape, dtype: memory[margin:-margin].view(shape))
    calls.attend(q, k, v, g)
    assert not memory[margin:-margin].isnan().any()
    assert memory[:margin].isnan().all()
    assert memory[-margin:].isnan().all()


@needs_library
def test_half_precision_is_rounded_as_torch_rounds():
    """With one key the output is v, scaled by 1: subnormals, infinities and ties must pass unchanged."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        v = bits.view(dtype)
        v = v[v.isfinite()].view(1, 1, -1, 1, 64)
        q = torch.zeros_like(v)
        assert torch.equal(module.temporal_attention(q, q, v, torch.zeros(1)), v)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    q, k, v = torch.randn(1, 33, 300, 3, 2, 64, generator=torch.Generator().manual_seed(0)).unbind(3)
    g = toeplitz(33, 2.0)
    try:
        torch.set_num_threads(1)
        alone = module.temporal_attention(q, k, v, g)
        torch.set_num_threads(threads)
        assert torch.equal(module.temporal_attention(q, k, v, g), alone)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda c: c["name"])
def test_golden(case, isa, monkeypatch):
    monkeypatch.setenv("VSTAR_CPU_ISA", isa)
    config, tensors = case["config"], {name: torch.from_numpy(x) for name, x in GOLDEN.inputs(case).items()}
    q, k, v, golden = (
        tensors[name].float().unflatten(-1, (config["heads"], -1)).transpose(0, 1)[None] for name in ("q", "k", "v", "out")
    )
    stored = tensors.get("pos", torch.arange(config["positions"]))
    frames = config["frames"]
    g = toeplitz(frames, config["std"], config["scale"]) if config["regularised"] else torch.zeros(frames)
    assert relative_error(module.temporal_attention(q, k, v, g)[:, :, stored], golden.double()) <= 1e-5


MEMORY = """
import torch
from vstar_engine.kernels.temporal_attention import temporal_attention

def kib(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

def peak(frames):
    x, g = torch.randn(1, frames, 64, 1, 64), torch.ones(1, frames)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = kib("VmRSS")
    temporal_attention(x, x, x, g)
    return kib("VmHWM") - before

torch.set_num_threads(1)
peak(8)
print(*(peak(frames) for frames in (16, 64, 256, 512)))
"""
# kilobytes that the interpreter and its allocator move by in such a call
NOISE_KIB = 1024


@needs_library
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resetting a process's peak memory needs Linux")
def test_memory_grows_linearly_with_frames():
    """A call's peak is its output and, for each frame, three staged rows and a row of a 64-wide panel: nothing N x N."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    for frames, peak in zip((16, 64, 256, 512), map(int, run.stdout.split()), strict=True):
        assert peak <= frames * 64 * (64 + 5) * 4 / 1024 + NOISE_KIB


def test_a_library_of_other_sources_is_said(monkeypatch):
    other = Path(_ctypes.__file__)  # a library, and not ours
    monkeypatch.setattr(library, "_installed", lambda: [other])
    reason = library._load.__wrapped__()
    assert "was built from other sources" in reason
    assert "reinstall" in reason


@needs_library
def test_a_library_whose_arguments_are_others_is_said(monkeypatch):
    """It would read one field for another, and write where it should not."""

    class Shorter(ctypes.Structure):
        _fields_ = arguments.LinearArguments._fields_[:-2]

    monkeypatch.setitem(arguments.CALLS, "vstar_linear", Shorter)
    assert "built from other sources: vstar_linear takes other arguments; reinstall" in library._load.__wrapped__()


def test_missing_library_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(library, "_load", lambda: "no compiler")
    library._warn.cache_clear()
    q, k, v, g = make(5, 8, torch.float32, "ordinary", "gaussian", "same", "fused")
    with pytest.warns(RuntimeWarning, match="no compiler"):
        first = module.temporal_attention(q, k, v, g)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.temporal_attention(q, k, v, g)
    assert "no compiler" in caplog.text
    assert library.status() == (False, "no compiler")
    assert torch.equal(first, module.temporal_attention_ref(q, k, v, g))
    library._warn.cache_clear()


@needs_library
def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("VSTAR_CPU_ISA", "altivec")
    with pytest.raises(ValueError, match="VSTAR_CPU_ISA must be one of"):
        library.status()

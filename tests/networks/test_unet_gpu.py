"""The UNet and its temporal attention on a GPU against ground truth; the same tests run small on the CPU."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden.load_golden import Golden
from torch import Tensor

from vstar_engine.bench.harness.random_networks import LAYOUTS, lay_out, relative_error
from vstar_engine.kernels.temporal_attention import temporal_attention, temporal_attention_ref
from vstar_engine.networks.unet import UNet
from vstar_engine.sampling import tar
from vstar_engine.weights import checkpoint, official_config

GOLDEN = Golden(str(Path(__file__).parents[1] / "golden"))
CASES = [case["name"] for case in GOLDEN.cases("unet")]
SMALL = "unet_tar_both_perframe_step13"
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# two orders of the same float32 sums: the golden cases' rounding probes are 3e-6 to 5e-6
ROUNDING = 2e-5
# on the CPU fp16 shows 6e-3 to 1e-2, 6e-3 of it from rounding the weights; leaving out the regulariser shows 0.6
FP16_BUDGET = 2e-2
# float32 sums over 64 products and 64 keys; fp16 adds the rounding of its output, 2**-11, and of the probabilities
ATTENTION_BUDGET = {torch.float32: 5e-6, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """Keeps TF32 out of the float32 comparisons."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def load_case(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[UNet, list[Tensor], dict[str, Tensor]]:
    """Returns a golden case's network, the network's inputs and all its tensors."""
    case = GOLDEN.case(name)
    config = case["config"]
    spec = official_config.spec_from_official(case.get("unet_params") or GOLDEN.case("tiny_model")["config"]["unet_params"])
    with torch.device("meta"):
        unet = UNet(spec).eval()
    checkpoint.load(unet, GOLDEN.weights(case), device=device, dtype=dtype)
    tensors = {key: torch.as_tensor(value) for key, value in GOLDEN.inputs(case).items()}
    frames = tensors["x"].shape[2]
    rows = torch.zeros(1, spec.levels, frames)
    for width, (sigma, strength) in config.get("tar", {}).items() if config["regularised_layers"] else ():
        rows[0, int(math.log2(config["hw"][1] / int(width)))] = tar.toeplitz(frames, sigma, strength)
    context = tensors["context"][None] if config["per_frame"] else tensors["context"][:, None]
    inputs = [tensors["x"].to(dtype), tensors["timesteps"][:, None], context.to(dtype), tensors["fps"], rows]
    return unet, [x.to(device) for x in inputs], tensors


def error_to_golden(out: Tensor, tensors: dict[str, Tensor]) -> float:
    """Returns the worst relative L2 error over what the case stored: the output, or some frames and every frame's square."""
    out = out.cpu().double()
    if "out" in tensors:
        return relative_error(out, tensors["out"].double())
    squares = out.square().sum(dim=(0, 1, 3, 4))
    frames = out[:, :, tensors["frames_idx"]]
    return max(
        relative_error(squares, tensors["out_frame_sq"].double()), relative_error(frames, tensors["out_frames"].double())
    )


@pytest.mark.parametrize(
    ("device", "name"), [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in CASES] + [("cpu", SMALL)]
)
@torch.no_grad()
def test_forward_equals_golden(device: str, name: str) -> None:
    unet, inputs, tensors = load_case(name, device)
    probe = GOLDEN.case(name)["rounding_probe"]["rel_l2"]
    assert error_to_golden(unet(*inputs), tensors) <= min(1e-4, max(1e-5, 20 * probe))


@pytest.mark.parametrize("name", [SMALL, "unet_full_topology_64D1_32D8"])
@pytest.mark.parametrize("device", [CUDA, pytest.param("cpu", marks=pytest.mark.slow)])
@torch.no_grad()
def test_fp16_stays_within_its_budget(device: str, name: str) -> None:
    unet, inputs, tensors = load_case(name, device, torch.float16)
    assert error_to_golden(unet(*inputs), tensors) <= FP16_BUDGET


@pytest.mark.parametrize("device", [CUDA, "cpu"])
@torch.no_grad()
def test_layouts_agree(device: str) -> None:
    unet, inputs, _ = load_case(SMALL, device)
    last, contiguous = (lay_out(unet, layout)(*inputs) for layout in LAYOUTS)
    assert relative_error(last, contiguous) <= ROUNDING


@pytest.mark.parametrize("device", [CUDA, "cpu"])
@torch.no_grad()
def test_guidance_in_one_batch_equals_two_passes(device: str) -> None:
    unet, (latents, timestep, context, fps, rows), _ = load_case(SMALL, device)
    contexts = torch.cat([context, context.flip(1)])
    passes = [unet(latents, timestep, one[None], fps, rows) for one in contexts]
    batch = unet(latents.repeat(2, 1, 1, 1, 1), timestep.repeat(2, 1), contexts, fps.repeat(2), rows)
    assert relative_error(passes[1], passes[0]) > 100 * ROUNDING
    assert relative_error(batch, torch.cat(passes)) <= ROUNDING


@pytest.mark.parametrize("dtype", ATTENTION_BUDGET, ids=str)
@pytest.mark.parametrize(
    ("batch", "frames", "keys", "positions", "heads", "head_dim"),
    [(2, 64, 64, 40, 5, 64), (1, 16, 16, 3, 8, 64), (1, 17, 21, 5, 2, 32), (1, 1, 1, 1, 1, 16)],
    ids=["plain", "short", "guide-keys", "tiny"],
)
@pytest.mark.parametrize("device", [CUDA, "cpu"])
def test_attention_equals_the_cpu_reference(
    device: str, batch: int, frames: int, keys: int, positions: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, n, positions, heads, head_dim, generator=generator).to(dtype) for n in (frames, keys, keys))
    g = torch.stack([tar.toeplitz(frames, 1.0 + i) for i in range(batch)])
    exact = temporal_attention_ref(q.double(), k.double(), v.double(), g.double())
    ours = temporal_attention(q.to(device), k.to(device), v.to(device), g.to(device))
    assert ours.dtype == dtype
    assert relative_error(ours.cpu(), exact) <= ATTENTION_BUDGET[dtype]

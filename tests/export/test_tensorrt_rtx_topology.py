"""All of VideoCrafter2's layers, narrower, through NVIDIA's own parser and builder, without a GPU; opt in with VSTAR_RTX=1."""

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import pytest
import torch

from support import tensorrt_wheels
from support.tensorrt_plans import FOUR, check_unet

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.config.models import Spec, TextSpec, UNetSpec, VaeSpec
from vstar_engine.export import to_onnx
from vstar_engine.export.traced_networks import unet
from vstar_engine.weights.key_map import UNET, official_shapes

TOPOLOGY = UNetSpec(model_channels=32, head_dim=8, context_dim=16, norm_groups=8)
KINDS = {"float32": "FLOAT", "float16": "HALF"}


@pytest.fixture(scope="module")
def weights():
    tensorrt_wheels.rtx()
    spec = Spec("topology", TOPOLOGY, VaeSpec(), TextSpec(width=16), size=(64, 64))
    return {name: 0.02 * torch.randn(shape) for name, shape in official_shapes(spec).items() if name.startswith(UNET)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KINDS)
def test_every_layer_becomes_a_plan(dtype, weights, tmp_path):
    path = tmp_path / "unet.onnx"
    assert to_onnx.write(unet(TOPOLOGY, getattr(torch, dtype), (8, 8)), weights, path)["temporal_attentions"] == 34
    check_unet(path, 34, KINDS[dtype], tmp_path / "unet.plan")


@pytest.mark.slow
def test_a_free_height_and_width_two_profiles_and_four_architectures(weights, tmp_path):
    path, sides = tmp_path / "unet.onnx", {"height": [8, 8, 16], "width": [8, 8, 16]}
    to_onnx.write(unet(TOPOLOGY, torch.float16), weights, path)
    check_unet(path, 34, "HALF", tmp_path / "unet.plan", (16, 64), FOUR, sides)

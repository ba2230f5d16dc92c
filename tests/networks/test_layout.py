"""Memory stays channels-last from the first convolution to the last: tensors that are copied for their layout's sake alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vstar_engine.bench.harness.random_networks import lay_out, seeded_unet, step_inputs
from vstar_engine.bench.step.workload import TINY
from vstar_engine.config.models import MODELS
from vstar_engine.export import traced_networks
from vstar_engine.export.to_inductor import with_texts_axis
from vstar_engine.machine.memory import without_data
from vstar_engine.networks.unet import UNet


class Copies(TorchDispatchMode):
    """Writes down the shapes of copied tensors."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::clone", "aten::copy_", "aten::contiguous"):
            self.shapes.append(tuple(out.shape))
        return out


# cells of the latents and frames of which none is another's, nor the latents' channels, nor any layer's, at any level
SIZE, FRAMES = (80, 112), 3


def copied(net, inputs, monkeypatch):
    """Returns the shapes of hidden states that a forward copies, apart from the latents' own as they come and go."""
    inside, contiguous = [], torch.Tensor.contiguous

    def noted(x, *args, **kwargs):
        """Our ops ask for it where a dispatch mode does not see it."""
        if not args and not kwargs and not x.is_contiguous():
            inside.append(tuple(x.shape))
        return contiguous(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "contiguous", noted)
    with Copies() as copies:
        net(*inputs)
    latents, height, width = inputs[0].shape[1], *inputs[0].shape[-2:]
    # (batch, frames, channels) is a residual block's embedding, repeated for each frame
    hidden = [shape for shape in copies.shapes + inside if len(shape) > 3]
    ends = [shape for shape in hidden if shape[1] == latents and shape[-2:] == (height, width)]
    assert 1 <= len(ends) <= 4
    return [shape for shape in hidden if shape not in ends]


def tiny():
    return lay_out(seeded_unet(TINY.unet, "cpu", torch.float32), "channels_last")


@torch.no_grad()
def test_only_the_ends_are_copied(monkeypatch):
    """Latents come and go as (B, 4, T, H, W); whatever else is copied would be a layout's fault."""
    assert copied(tiny(), step_inputs(TINY, SIZE, FRAMES, "cpu", torch.float32), monkeypatch) == []


@pytest.mark.parametrize("make", [torch.Tensor.clone, lambda x: x.contiguous()], ids=["a copy", "another layout"])
@pytest.mark.parametrize(
    ("part", "shape"),
    [("input_blocks.1.0", (6, 16, 10, 14)), ("middle_block.0", (6, 32, 5, 7)), ("output_blocks.3.0", (6, 16, 10, 14))],
)
@torch.no_grad()
def test_a_planted_copy_is_found(part, shape, make, monkeypatch):
    net = tiny()
    layer, *_ = [module for name, module in net.named_modules() if name == part]
    layer.register_forward_hook(lambda module, given, out: make(out))
    # one branch until the first cross-attention, then two
    found = copied(net, step_inputs(TINY, SIZE, FRAMES, "cpu", torch.float32), monkeypatch)
    assert {found_shape[1:] for found_shape in found} >= {shape[1:]}


def copies(program):
    """Lists what an exported graph copies, with the module it stands in: copies by name, and reshapes that no view can be."""
    found = []
    for node in program.graph.nodes:
        name = str(node.target)
        module = next(reversed(node.meta.get("nn_module_stack", {}).values()), ("",))[0]
        if node.op == "call_function" and any(word in name for word in ("clone", "contiguous", "copy")):
            found.append((module, name))
        elif node.op == "call_function" and name.startswith(("aten.flatten", "aten.reshape")):
            try:
                node.args[0].meta["val"].view(node.meta["val"].shape)
            except (RuntimeError, ValueError):
                found.append((module, name))
    return found


FULL = MODELS["videocrafter2"]
# every layer of the full model in few channels
SMALL = replace(
    FULL,
    name="full topology",
    unet=replace(FULL.unet, model_channels=16, head_dim=8, context_dim=32, norm_groups=8),
    size=(128, 192),
)


def exported(spec, make=lambda unet: unet, held=lambda described: described):
    """Exports as for a compiler: weights channels-last, every axis but the size free. Nothing is computed."""
    cells = tuple(side // spec.vae.factor for side in spec.size)
    described = traced_networks.unet(spec.unet, torch.float32, cells)
    with without_data():
        unet = make(lay_out(UNet(spec.unet).eval().requires_grad_(False), "channels_last"))
        inputs = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in described.inputs.items()}
        traced = held(replace(described, module=unet, inputs=inputs))
    return torch.export.export(traced.module, (), traced.inputs, dynamic_shapes=traced.dims, strict=False)


ENDS = [("", "aten.flatten.using_ints"), ("", "aten.contiguous.default")]


@pytest.mark.parametrize(
    "spec", [TINY, *(pytest.param(spec, marks=pytest.mark.slow) for spec in (SMALL, FULL))], ids=lambda spec: spec.name
)
@torch.no_grad()
def test_an_exported_graph_copies_only_its_ends(spec):
    assert copies(exported(spec)) == ENDS


@torch.no_grad()
def test_a_package_copies_else_only_where_its_texts_part():
    """TAR, hidden states and their residual in the first spatial transformer, and the skip from before it."""
    first, *parts, last = copies(exported(TINY, held=with_texts_axis))
    assert [first[1], last[1]] == [op for _, op in ENDS]
    block = "module.input_blocks.1.1"
    where = ["module", f"{block}.transformer_blocks.0", block, "module"]
    assert parts == [(module, "aten.flatten.using_ints") for module in where]


@torch.no_grad()
def test_a_copy_planted_in_a_network_is_found_in_its_graph():
    def planted(unet):
        unet.middle_block[0].register_forward_hook(lambda module, given, out: out.contiguous())
        return unet

    assert [found for found in copies(exported(TINY, planted)) if found not in ENDS] == [
        ("middle_block.0", "aten.contiguous.default")
    ]


class Careless(nn.Module):
    """A convolution whose result is read channels-last and handed on otherwise."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        rows = self.conv(x).permute(0, 3, 2, 1).flatten(1, 2)
        return rows.mT.contiguous(), x.flatten(2)


@torch.no_grad()
def test_a_copy_for_a_layouts_sake_is_found():
    program = torch.export.export(lay_out(Careless(), "channels_last"), (torch.randn(2, 4, 3, 5),))
    assert copies(program) == [("", "aten.flatten.using_ints"), ("", "aten.contiguous.default")]

"""Memory stays channels-last from the first convolution to the last: tensors that are copied for their layout's sake alone."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vstar_engine.bench.scene import TINY
from vstar_engine.bench.seeded import lay_out, seeded_unet, step_inputs
from vstar_engine.config import MODELS
from vstar_engine.export import network


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


@torch.no_grad()
def test_only_the_ends_are_copied(monkeypatch):
    """Latents come and go as (B, 4, T, H, W); whatever else is copied would be a layout's fault."""
    net = lay_out(seeded_unet(TINY.unet, "cpu", torch.float32), "channels_last")
    inputs = step_inputs(TINY, TINY.size, 3, "cpu", torch.float32)
    inside, contiguous = [], torch.Tensor.contiguous

    def noted(x, *args, **kwargs):
        """Our ops ask for it where a dispatch mode does not see it."""
        if not args and not kwargs and not x.is_contiguous():
            inside.append(tuple(x.shape))
        return contiguous(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "contiguous", noted)
    with Copies() as copies:
        net(*inputs)
    # (batch, frames, channels) is a residual block's embedding, repeated for each frame; the latents' channels are 4
    hidden = [shape for shape in copies.shapes + inside if len(shape) > 3]
    assert 1 <= len(hidden) <= 4
    assert [shape for shape in hidden if 4 not in shape[1:3]] == []


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


@pytest.mark.parametrize("spec", [TINY, pytest.param(MODELS["mini"], marks=pytest.mark.slow)], ids=lambda spec: spec.name)
@torch.no_grad()
def test_an_exported_graph_copies_only_its_ends(spec):
    """As AOTInductor gets it: weights channels-last, every axis but the size free."""
    unet = lay_out(seeded_unet(spec.unet, "cpu", torch.float32), "channels_last")
    cells = tuple(side // spec.vae.factor for side in spec.size)
    traced = network.unet(spec.unet, torch.float32, cells).on(unet, torch.device("cpu"))
    program = torch.export.export(traced.module, (), traced.inputs, dynamic_shapes=traced.dims, strict=False)
    assert copies(program) == [("", "aten.flatten.using_ints"), ("", "aten.contiguous.default")]


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

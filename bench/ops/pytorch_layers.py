"""The engine's layers as PyTorch's own operators or Triton's products compute them, and glibc's own ways with large tensors."""

import ctypes

import torch
from torch import Tensor, nn

from vstar_engine.bench.harness.random_networks import Network
from vstar_engine.kernels.fp8_linear import unfused as fp8_unfused
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu_ref
from vstar_engine.kernels.linear import linear_ref, normed
from vstar_engine.kernels.problems import Fp8LinearProblem, LayerNorm, LinearProblem
from vstar_engine.machine.malloc import M_MMAP_MAX, M_TRIM_THRESHOLD
from vstar_engine.networks.blocks import SpatialBlock
from vstar_engine.networks.fp8 import Fp8Linear, Fp8Pointwise
from vstar_engine.networks.layers import Linear, Norm, Pointwise
from vstar_engine.networks.spatial_attention import sdpa

M_MMAP_THRESHOLD = -3
# where glibc's thresholds have grown to once large tensors were freed, and how many it maps at most
GROWN, MAPPED = 32 * 2**20, 65536


class PlainNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return groupnorm_silu_ref(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class PlainLinear(Linear):
    def forward(self, x: Tensor, residual: Tensor | None = None, gate: bool = False, norm: LayerNorm | None = None) -> Tensor:
        return linear_ref(LinearProblem(x, self.weight.flatten(1), self.bias, residual, gate, *(norm or ())))


class OneGoLinear(Linear):
    """As Triton's product on a GPU, for tensors without data: the rows' moments, then all the rest in one go."""

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: bool = False, norm: LayerNorm | None = None) -> Tensor:
        if residual is None and not gate and norm is None:
            return super().forward(x)
        if norm is not None:
            torch.var_mean(x, -1)
        return torch.ops.vstar.linear(*LinearProblem(x, self.weight.flatten(1), self.bias, residual, gate, *(norm or ())))


class PlainFp8(Fp8Linear):
    """As PyTorch's product in FP8 on a GPU: the norm, the rounding, the gate and the residual in passes of their own."""

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: bool = False, norm: LayerNorm | None = None) -> Tensor:
        given = (normed(x, norm), self.weight, self.step, self.scale, self.bias, residual, gate, self.then, self.dtype)
        return fp8_unfused(Fp8LinearProblem(*given))


class PlainFp8Pointwise(Fp8Pointwise, PlainFp8):
    """As `PlainFp8`, for a 1x1 convolution."""


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    Norm: PlainNorm,
    **dict.fromkeys((Linear, Pointwise), PlainLinear),
    Fp8Linear: PlainFp8,
    Fp8Pointwise: PlainFp8Pointwise,
}


def unfused(network: Network, *kinds: type[nn.Module]) -> Network:
    """Makes layers of some kinds compute by PyTorch's own operators, in place; `SpatialBlock` stands for its attention."""
    for module in network.modules():
        if isinstance(module, kinds) and type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
        if isinstance(module, SpatialBlock) and SpatialBlock in kinds:
            module.attend = sdpa
    return network


def in_one_go(unet: Network) -> Network:
    """Makes the linear layers of a network without data as Triton's products, in site."""
    for module in unet.modules():
        if isinstance(module, Linear):
            module.__class__ = OneGoLinear
    return unet


def map_pages() -> None:
    """Undoes `allocator.keep_pages`: large tensors are mapped for each operator, as glibc does of itself."""
    library = ctypes.CDLL(None)
    for number, value in ((M_MMAP_MAX, MAPPED), (M_MMAP_THRESHOLD, GROWN), (M_TRIM_THRESHOLD, 2 * GROWN)):
        library.mallopt(number, value)

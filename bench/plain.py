"""The engine's layers as PyTorch's own operators compute them, and glibc's own ways with large tensors."""

import ctypes

from torch import Tensor, nn

from vstar_engine.allocator import M_MMAP_MAX, M_TRIM_THRESHOLD
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu_ref
from vstar_engine.kernels.linear import LayerNorm, linear_ref
from vstar_engine.layers import Linear, Norm, Pointwise
from vstar_engine.spatial_attention import sdpa
from vstar_engine.unet import SpatialBlock

from .seeded import Network

M_MMAP_THRESHOLD = -3
# where glibc's thresholds have grown to once large tensors were freed, and how many it maps at most
GROWN, MAPPED = 32 * 2**20, 65536


class PlainNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return groupnorm_silu_ref(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class PlainLinear(Linear):
    def forward(self, x: Tensor, residual: Tensor | None = None, gate: bool = False, norm: LayerNorm | None = None) -> Tensor:
        return linear_ref(x, self.weight.flatten(1), self.bias, residual, gate, norm)


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    Norm: PlainNorm,
    **dict.fromkeys((Linear, Pointwise), PlainLinear),
}


def by_operators(network: Network, *kinds: type[nn.Module]) -> Network:
    """Makes layers of some kinds compute by PyTorch's own operators, in place; `SpatialBlock` stands for its attention."""
    for module in network.modules():
        if isinstance(module, kinds) and type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
        if isinstance(module, SpatialBlock) and SpatialBlock in kinds:
            module.attend = sdpa
    return network


def map_pages() -> None:
    """Undoes `allocator.keep_pages`: large tensors are mapped for each operator, as glibc does of itself."""
    library = ctypes.CDLL(None)
    for number, value in ((M_MMAP_MAX, MAPPED), (M_MMAP_THRESHOLD, GROWN), (M_TRIM_THRESHOLD, 2 * GROWN)):
        library.mallopt(number, value)

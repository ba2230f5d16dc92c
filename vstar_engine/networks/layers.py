"""The layers that the video UNet is made of: norms, linear layers, attentions. Parameters keep the official names."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.config.models import UNetSpec
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu
from vstar_engine.kernels.linear import feed_forward, linear
from vstar_engine.kernels.problems import LayerNorm, LinearProblem

from .precomputed import ContextKV

GROUPS = UNetSpec.norm_groups


class Norm(nn.GroupNorm):
    """A group norm of (N, C, ...), fused with the SiLU that follows it where `silu`."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, silu: bool = False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return groupnorm_silu(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


def normed(groups: int, channels: int, *then: nn.Module) -> nn.Sequential:
    """Returns a group norm with SiLU and the layers after it; the identity keeps the numbering of the official keys."""
    return nn.Sequential(Norm(groups, channels, silu=True), nn.Identity(), *then)


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Embeds numbers (...) as (..., width) float32: cosines of all frequencies first, then sines."""
    half = width // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angle = values.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Linear(nn.Linear):
    """A linear layer over the last axis, with an optional layer norm before it and a residual or GEGLU gate after it."""

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: bool = False, norm: LayerNorm | None = None) -> Tensor:
        return linear(LinearProblem(x, *self.given(), residual, gate, *(norm or ())))

    def given(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.flatten(1), self.bias

    def replaced(self) -> bool:
        """Returns whether the layer was subclassed or has hooks, so that it must not be fused."""
        return type(self).forward is not Linear.forward or bool(self._forward_hooks or self._forward_pre_hooks)


class RowNorm(nn.LayerNorm):
    """A layer norm over the last axis; the linear layer after it computes it."""

    def given(self) -> LayerNorm:
        return LayerNorm(self.weight, self.bias, self.eps)


class Pointwise(Linear):
    """A linear layer whose stored weight is (out, in, 1, ...), `ones` ones, as for a convolution."""

    def __init__(self, in_features: int, out_features: int, ones: int):
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach()[(..., *[None] * ones)])


class FrameConv(nn.Conv3d):
    """A 3x1x1 convolution over frames, zero-padded at the clip's ends, run on (B, C, T, P) as a 2-D one."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.flatten(3), self.bias, padding=self.padding[:2])


class GEGLU(nn.Module):
    """Projects to value and gate halves and gates with the exact GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: Tensor, norm: LayerNorm) -> Tensor:
        return self.proj(x, gate=True, norm=norm)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor, norm: LayerNorm) -> Tensor:
        """Returns x + feed_forward(norm(x))."""
        first, second = self.net[0].proj, self.net[2]
        if isinstance(first, Linear) and isinstance(second, Linear) and not (first.replaced() or second.replaced()):
            return feed_forward(x, first.given(), second.given(), norm)
        return second(self.net[0](x, norm), x)


class SelfAttention(nn.Module):
    """One fused, bias-free q, k, v projection, an attention given by the caller, and the output projection."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_qkv = Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(Linear(heads * head_dim, width))

    def forward(self, x: Tensor, norm: LayerNorm, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Returns x + attention(norm(x)), x (..., width); `attend` takes q, k, v (..., heads, head_dim), views of one."""
        q, k, v = self.to_qkv(x, norm=norm).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        return self.to_out[0](attend(q, k, v).flatten(-2), x)


class CrossAttention(nn.Module):
    """Attention of positions to text; frames that share a text share its K and V."""

    def __init__(self, width: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_q = Linear(width, heads * head_dim, bias=False)
        self.to_kv = Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(Linear(heads * head_dim, width))

    def project(self, context: Tensor) -> Tensor:
        """Returns K and V side by side, (N, L, 2 * heads * head_dim), of texts (N, L, context_dim)."""
        return self.to_kv(context)

    def forward(
        self,
        x: Tensor,
        norm: LayerNorm | None,
        context: Tensor | ContextKV,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Returns x + attention(norm(x), context), x (B*T, P, width), context (B, 1 or T, L, context_dim)."""
        kv = context.kv[self] if isinstance(context, ContextKV) else self.project(context.flatten(0, 1))
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).unbind(-3)
        q = self.to_q(x, norm=norm).reshape(k.shape[0], -1, self.heads, self.head_dim)
        return self.to_out[0](attend(q, k, v).reshape(*x.shape[:2], -1), x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

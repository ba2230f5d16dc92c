"""The UNet's blocks: residual blocks with temporal convolutions, spatial and temporal transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.config.models import UNetSpec
from vstar_engine.kernels.temporal_attention import temporal_attention, temporal_attention_dense

from .appearance import MixedCrossAttention
from .layers import (
    GROUPS,
    CrossAttention,
    FeedForward,
    FrameConv,
    Norm,
    Pointwise,
    RowNorm,
    SelfAttention,
    normed,
)
from .precomputed import ContextKV, TimestepEmbedding
from .spatial_attention import SPATIAL_ATTENTION


class TemporalConvBlock(nn.Module):
    """Four layers of (group norm over the whole clip, SiLU, convolution over frames), added to the input."""

    def __init__(self, channels: int, groups: int = GROUPS):
        super().__init__()

        def layer(*between: nn.Module) -> nn.Sequential:
            return normed(groups, channels, *between, FrameConv(channels))

        # the identity stands where training has its dropout, which numbers the official keys
        self.conv1 = layer()
        self.conv2, self.conv3, self.conv4 = (layer(nn.Identity()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) in and out."""
        h = x.flatten(3)
        return x + self.conv4(self.conv3(self.conv2(self.conv1(h)))).unflatten(3, x.shape[3:])


class ResBlock(nn.Module):
    """Residual block per frame, then its temporal convolutions over the clip."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, temporal_conv: bool = True, groups: int = GROUPS
    ):
        super().__init__()
        self.channels = out_channels
        self.in_layers = normed(groups, in_channels, nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = normed(groups, out_channels, nn.Identity(), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.temporal_conv = TemporalConvBlock(out_channels, groups) if temporal_conv else None

    def forward(self, x: Tensor, emb: Tensor | TimestepEmbedding, frames: int) -> Tensor:
        """x (B*T, C, H, W), emb (B or B*T, E) -> (B*T, C_out, H, W).

        With emb (B, 1 or T, E), x may be (kB*T, C, H, W): k branches, one after another, share the embedding.
        """
        h = self.in_layers(x)
        if isinstance(emb, TimestepEmbedding):
            shift = emb.blocks[self]
        elif emb.dim() == 3:
            shift = self.emb_layers(emb)
        else:
            shift = self.emb_layers(emb).unflatten(0, (x.shape[0] // frames, -1))
        h = (h.unflatten(0, (-1, shift.shape[0], frames)) + shift[..., None, None]).flatten(0, 2)
        h = self.skip_connection(x) + self.out_layers(h)
        return h if self.temporal_conv is None else to_frames(self.temporal_conv(to_clip(h, frames)))


def to_clip(x: Tensor, frames: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W), a view."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def to_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W), a view in channels-last memory."""
    return x.transpose(1, 2).flatten(0, 1)


def repeat_branches(x: Tensor, rows: int, pixels: bool = False) -> Tensor:
    """Repeats x along its first axis to `rows` rows, one copy for each guidance branch.

    `pixels`: x is (N, C, H, W) and stays in channels-last memory.
    """
    branches = rows // x.shape[0]
    if branches == 1:
        return x
    if isinstance(branches, int):
        return torch.cat([x] * branches)
    # a traced graph leaves their number open
    if pixels:
        return repeat_branches(x.permute(0, 2, 3, 1), rows).permute(0, 3, 1, 2)
    return x.expand(branches, *x.shape).flatten(0, 1)


class SpatialBlock(nn.Module):
    def __init__(self, width: int, heads: int, spec: UNetSpec, attention: str):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (RowNorm(width) for _ in range(3))
        self.attn1 = SelfAttention(width, heads, spec.head_dim)
        self.attn2: CrossAttention
        if spec.image_tokens:
            self.attn2 = MixedCrossAttention(width, spec.context_dim, heads, spec.head_dim, spec.image_tokens)
        else:
            self.attn2 = CrossAttention(width, spec.context_dim, heads, spec.head_dim)
        self.ff = FeedForward(width)
        self.attend = SPATIAL_ATTENTION[attention]()

    def forward(self, x: Tensor, context: Tensor | ContextKV, rows: int) -> Tensor:
        x = repeat_branches(self.attn1(x, self.norm1.given(), self.attend), rows)
        x = self.attn2(x, self.norm2.given(), context, self.attend)
        return self.ff(x, self.norm3.given())


class SpatialTransformer(nn.Module):
    """Self-attention within each frame and cross-attention to its text."""

    def __init__(self, channels: int, spec: UNetSpec, attention: str):
        super().__init__()
        ones = 0 if spec.use_linear else 2
        heads = channels // spec.head_dim
        self.norm = Norm(spec.norm_groups, channels, eps=1e-6)
        self.proj_in = Pointwise(channels, channels, ones)
        self.transformer_blocks = nn.ModuleList(
            SpatialBlock(channels, heads, spec, attention) for _ in range(spec.transformer_depth)
        )
        self.proj_out = Pointwise(channels, channels, ones)

    def forward(self, x: Tensor, context: Tensor | ContextKV, frames: int) -> Tensor:
        """x (B*T or kB*T, C, H, W), context (kB, 1 or T, L, context_dim) -> (kB*T, C, H, W)."""
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        rows = context.shape[0] * frames
        for block in self.transformer_blocks:
            h = block(h, context, rows)
        before = repeat_branches(x.permute(0, 2, 3, 1).flatten(1, 2), rows)
        return self.proj_out(h, before).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class TemporalBlock(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (RowNorm(width) for _ in range(3))
        self.attn1, self.attn2 = (SelfAttention(width, heads, head_dim) for _ in range(2))
        self.ff = FeedForward(width)
        # the first frames of windows and their length, where attention is computed in windows (`attention_windows`)
        self.spans: tuple[Sequence[int], int] | None = None
        # returns K and V of an attention with those of guide frames behind (`guide_keys`)
        self.more_keys: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x (B, T, P, width); g (1 or B, T), or dense (1 or B, T, T)."""
        if self.spans is None:
            x = self.attended(x, g)
        else:
            starts, length = self.spans
            windows = [slice(start, start + length) for start in starts]
            x = averaged([self.attended(x[:, w], g[:, :length] if g.dim() == 2 else g[:, w, w]) for w in windows], starts, x)
        return self.ff(x, self.norm3.given())

    def attended(self, x: Tensor, g: Tensor) -> Tensor:
        """Returns x with both attentions added."""
        op = temporal_attention if g.dim() == 2 else temporal_attention_dense
        for attention, norm in ((self.attn1, self.norm1), (self.attn2, self.norm2)):

            def attend(q: Tensor, k: Tensor, v: Tensor, attention: nn.Module = attention) -> Tensor:
                if self.more_keys is None:
                    return op(q, k, v, g)
                k, v = self.more_keys(attention, k, v)
                # extra keys carry no bias
                return op(q, k, v, g if g.dim() == 2 else F.pad(g, (0, k.shape[1] - g.shape[2])))

            x = attention(x, norm.given(), attend)
        return x


def averaged(parts: Sequence[Tensor], starts: Sequence[int], like: Tensor) -> Tensor:
    """Averages windows (B, W, ...) at the frames `starts` by triangular weights; the result is shaped and typed like `like`."""
    length = parts[0].shape[1]
    place = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    rising = torch.minimum(place, place.flip(0)).view(length, *[1] * (like.dim() - 2))
    whole = torch.zeros(like.shape, device=like.device, dtype=torch.float32)
    weight = whole.new_zeros(like.shape[1], *rising.shape[1:])
    for part, start in zip(parts, starts, strict=True):
        whole[:, start : start + length] += rising * part
        weight[start : start + length] += rising
    return (whole / weight).to(like.dtype)


@contextmanager
def attention_windows(network: nn.Module, starts: Sequence[int], length: int) -> Iterator[None]:
    """Computes every temporal attention of a network in windows inside the block (FreeNoise, arXiv 2310.15169).

    Windows are averaged by triangular weights after both attentions of a block, before its feed-forward layer.
    """
    blocks = [part for part in network.modules() if isinstance(part, TemporalBlock)]
    for block in blocks:
        block.spans = (tuple(starts), length)
    try:
        yield
    finally:
        for block in blocks:
            block.spans = None


class TemporalTransformer(nn.Module):
    """Two regularised self-attentions over the frames of each position; the group norm spans the whole clip."""

    def __init__(self, channels: int, heads: int, head_dim: int, depth: int = 1, use_linear: bool = True, groups: int = GROUPS):
        super().__init__()
        ones, inner = 0 if use_linear else 1, heads * head_dim
        self.norm = Norm(groups, channels, eps=1e-6)
        self.proj_in = Pointwise(channels, inner, ones)
        self.transformer_blocks = nn.ModuleList(TemporalBlock(inner, heads, head_dim) for _ in range(depth))
        self.proj_out = Pointwise(inner, channels, ones)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x (B, C, T, H, W), g (1 or B, T) or dense (1 or B, T, T) float32 -> like x."""
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3))
        for block in self.transformer_blocks:
            h = block(h, g)
        rows = x.permute(0, 2, 3, 4, 1).flatten(2, 3)
        return self.proj_out(h, rows).unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)


class Stage(nn.ModuleList):
    """The layers of one official block, in order, and the level whose row of `tar` they take."""

    def __init__(self, level: int, *layers: nn.Module):
        super().__init__(layers)
        self.level = level

    def forward(
        self, x: Tensor, emb: Tensor | TimestepEmbedding, context: Tensor | ContextKV, tar: Tensor, frames: int
    ) -> Tensor:
        """x (B*T, C, H, W) -> the same, or (kB*T, C, H, W) behind the first cross-attention."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, frames)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, frames)
            elif isinstance(layer, TemporalTransformer):
                x = to_frames(layer(to_clip(x, frames), tar[:, self.level]))
            else:
                x = layer(x)
        return x

"""The conditional attention module: what the last frames of a chunk tell the next one. StreamingT2V, arXiv 2403.14773."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.config.models import UNetSpec
from vstar_engine.kernels.temporal_attention import temporal_attention

from .blocks import to_clip, to_frames
from .layers import CrossAttention, Norm, Pointwise
from .precomputed import ContextKV, TimestepEmbedding
from .unet import HalfUNet


class PixelEncoder(nn.Module):
    """Convolutions that bring pixels to the size of latents, without norms; `channels` has a width for each size."""

    def __init__(self, channels: tuple[int, ...], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(channels):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] -> (n, out_channels, h, w); each halving rounds up."""
        x = F.silu(self.conv_in(pixels))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ConditionalAttention(HalfUNet):
    """Half a UNet over the first frames of a chunk, to which the features of known frames are added."""

    def __init__(self, spec: UNetSpec, pixel_channels: tuple[int, ...], spatial_attention: str = "auto"):
        super().__init__(spec, spatial_attention)
        self.pixel_encoder = PixelEncoder(pixel_channels, spec.model_channels)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | TimestepEmbedding,
        context: Tensor | ContextKV,
        fps: Tensor,
        tar: Tensor,
        features: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the features that the skip connections, and the middle feature, of a UNet attend to.

        latents (B, C, K, H, W) are the first K frames of a chunk, `features` (B*K, C, H, W) the pixel encoder's of the K known
        frames; the rest as for `UNet.forward`. A feature is (B*K or kB*K, C, h, w), like the skip connection it belongs to.
        """
        inputs = self.stage_inputs(latents, timestep, context, fps, tar)
        skips = self.encode(self.stem(to_frames(latents), inputs) + features, inputs, self.input_blocks)
        return skips, self.middle_block(skips[-1], *inputs)


class FeatureFuser(nn.Module):
    """Attention of a UNet's features, over time, to features of known frames at the same position."""

    def __init__(self, channels: int, head_dim: int, groups: int):
        super().__init__()
        self.norm = Norm(groups, channels, eps=1e-6)
        self.proj_in = Pointwise(channels, channels, 0)
        # it projects what it attends to as it is, without a norm
        self.attention = CrossAttention(channels, channels, channels // head_dim, head_dim)
        self.proj_out = Pointwise(channels, channels, 0)

    def forward(self, x: Tensor, known: Tensor, frames: int, known_frames: int) -> Tensor:
        """x (B*T, C, H, W), known (B*K, C, H, W) -> like x."""
        attention = self.attention
        clip = to_clip(x, frames)
        h = self.proj_in(self.norm(clip).permute(0, 2, 3, 4, 1).flatten(2, 3))  # (B, T, P, C)
        heads = (attention.heads, attention.head_dim)
        kv = attention.to_kv(to_clip(known, known_frames).permute(0, 2, 3, 4, 1))
        k, v = kv.flatten(2, 3).unflatten(-1, (2, *heads)).unbind(-3)
        q = attention.to_q(h).unflatten(-1, heads)
        out = attention.to_out[0](temporal_attention(q, k, v, q.new_zeros(1, frames).float()).flatten(-2))
        rows = clip.permute(0, 2, 3, 4, 1).flatten(2, 3)
        return to_frames(self.proj_out(out, rows).unflatten(2, x.shape[2:]).permute(0, 4, 1, 2, 3))

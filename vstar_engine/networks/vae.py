"""The first-stage KL autoencoder, frame by frame: latents to pixels and back."""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.config.models import VaeSpec

from .layers import Norm, Upsample

# frames decoded at once: more gained only 2 to 4 % on a CPU (mini, one thread) and delay the first frame
CHUNK = 8


def norm(channels: int, groups: int, silu: bool = True) -> Norm:
    return Norm(groups, channels, 1e-6, silu)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels, groups), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels, groups), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all cells of a frame."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups, silu=False)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).mT[:, None] for proj in (self.q, self.k, self.v))  # (N, 1, cells, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Level(nn.Module):
    """Residual blocks of one resolution, then an optional change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, **resample: nn.Module):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    def __init__(self, spec: VaeSpec):
        super().__init__()
        widths = [spec.channels * mult for mult in spec.channel_mult]
        self.conv_in = nn.Conv2d(spec.in_channels, spec.channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = spec.channels
        for i, width in enumerate(widths):
            resample = {"downsample": Downsample(width)} if i < len(widths) - 1 else {}
            self.down.append(Level(channels, width, spec.num_res_blocks, spec.norm_groups, **resample))
            channels = width
        self.mid = Middle(channels, spec.norm_groups)
        self.norm_out = norm(channels, spec.norm_groups)
        self.conv_out = nn.Conv2d(channels, 2 * spec.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, spec: VaeSpec):
        super().__init__()
        widths = [spec.channels * mult for mult in spec.channel_mult]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(spec.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, spec.norm_groups)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            resample = {"upsample": Upsample(width)} if i else {}
            levels.append(Level(channels, width, spec.num_res_blocks + 1, spec.norm_groups, **resample))
            channels = width
        self.up = nn.ModuleList(reversed(levels))  # official keys count from full resolution
        self.norm_out = norm(channels, spec.norm_groups)
        self.conv_out = nn.Conv2d(channels, spec.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class Vae(nn.Module):
    """The autoencoder; without its encoder (`encoder=False`) it only decodes."""

    def __init__(self, spec: VaeSpec, encoder: bool = True):
        super().__init__()
        self.spec = spec
        self.unused: tuple[str, ...] = () if encoder else ("encoder.", "quant_conv.")
        if encoder:
            self.encoder = Encoder(spec)
            self.quant_conv = nn.Conv2d(2 * spec.z_channels, 2 * spec.embed_dim, 1)
        self.decoder = Decoder(spec)
        self.post_quant_conv = nn.Conv2d(spec.embed_dim, spec.z_channels, 1)

    def decode(self, latents: Tensor, chunk: int = CHUNK) -> Tensor:
        """(B, 4, T, h, w) scaled latents -> (B, 3, T, factor*h, factor*w) in about [-1, 1], `chunk` frames at a time."""
        pixels = torch.cat(list(self.decoded(latents, chunk)))
        return pixels.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)

    def decoded(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        """Yields the pixels of `decode` in runs of `chunk` frames, (n, 3, factor*h, factor*w) each, one clip after another."""
        for frames in (latents.transpose(1, 2).flatten(0, 1) / self.spec.scale_factor).split(chunk):
            yield self.decoder(self.post_quant_conv(frames))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, H, W) in [-1, 1] -> mean and log-variance (clamped to [-30, 20]), each (n, 4, H/factor, W/factor)."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] -> the scaled mode of the posterior, (n, 4, H/factor, W/factor) latents."""
        return self.spec.scale_factor * self.posterior(pixels)[0]

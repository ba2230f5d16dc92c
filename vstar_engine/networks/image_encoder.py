"""The OpenCLIP image tower: pixels to one embedding an image, with the preprocessing that StreamingT2V uses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.config.models import ImageSpec

from .text_encoder import ResidualAttentionBlock

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Tensor, size: int = ImageSpec.size) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] -> (n, 3, size, size), normalised for the tower.

    Images larger than `size` are blurred first. The bicubic resize aligns corners and does not clamp.
    """
    factors = [side / size for side in images.shape[-2:]]
    if max(factors) > 1:
        images = blurred(images, factors)
    resized = F.interpolate(images, (size, size), mode="bicubic", align_corners=True)
    mean, deviation = (resized.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return ((resized + 1) / 2 - mean) / deviation


def blurred(images: Tensor, factors: list[float]) -> Tensor:
    """Blurs images (n, c, H, W) by a separable Gaussian for sides that shrink by `factors`; borders are reflected."""
    for axis, factor in zip((2, 3), factors, strict=True):
        sigma = max((factor - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3)) // 2 * 2 + 1
        distance = torch.arange(taps, device=images.device, dtype=torch.float32) - taps // 2
        weights = torch.exp(-(distance**2) / (2 * sigma**2))
        shape = (taps, 1) if axis == 2 else (1, taps)
        kernel = (weights / weights.sum()).to(images.dtype).reshape(1, 1, *shape).expand(images.shape[1], -1, -1, -1)
        beyond = (0, 0, taps // 2, taps // 2) if axis == 2 else (taps // 2, taps // 2, 0, 0)
        images = F.conv2d(F.pad(images, beyond, mode="reflect"), kernel, groups=images.shape[1])
    return images


class Transformer(nn.Module):
    def __init__(self, spec: ImageSpec):
        super().__init__()
        blocks = (ResidualAttentionBlock(spec.width, spec.heads, causal=False) for _ in range(spec.layers))
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class ImageTower(nn.Module):
    """OpenCLIP's vision transformer: the projected class token, not normalised to unit length."""

    def __init__(self, spec: ImageSpec):
        super().__init__()
        self.spec = spec
        self.class_embedding = nn.Parameter(torch.empty(spec.width))
        self.positional_embedding = nn.Parameter(torch.empty((spec.size // spec.patch) ** 2 + 1, spec.width))
        self.proj = nn.Parameter(torch.empty(spec.width, spec.out))
        self.conv1 = nn.Conv2d(3, spec.width, spec.patch, stride=spec.patch, bias=False)
        self.ln_pre = nn.LayerNorm(spec.width)
        self.transformer = Transformer(spec)
        self.ln_post = nn.LayerNorm(spec.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (n, 3, size, size) -> (n, out)."""
        patches = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj

    def embed(self, images: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] -> (n, out)."""
        return self(clip_pixels(images, self.spec.size))

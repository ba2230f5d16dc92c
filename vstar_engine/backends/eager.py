"""The UNet in eager PyTorch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import checkpoint
from ..config import Spec
from ..unet import UNet


def load(
    spec: Spec, weights: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype, spatial_attention: str = "auto"
) -> UNet:
    """Builds the UNet and fills it from official names."""
    with torch.device("meta"):
        unet = UNet(spec.unet, spatial_attention)
    checkpoint.load(unet, weights, checkpoint.UNET, device=device, dtype=dtype)
    return unet.eval().requires_grad_(False)

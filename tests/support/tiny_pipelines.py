"""Tiny random denoisers and whole pipelines of diffusers, made locally."""

import torch
from torch import nn


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew, those too that are zero at first, large enough that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.6 if "to_q" in name or "to_k" in name else 0.2
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(drawn + 1 if "norm" in name and name.endswith("weight") else drawn)
    return module.eval()


def unet3d() -> nn.Module:
    """Returns a UNet3DConditionModel of three levels, 8 and 16 channels."""
    from diffusers import UNet3DConditionModel

    return randomised(
        UNet3DConditionModel(
            block_out_channels=(16, 16, 16),
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=8,
        )
    )


def motion_unet(positions: int = 8) -> nn.Module:
    """Returns a UNetMotionModel of two levels whose table of positions has so many frames."""
    from diffusers import UNetMotionModel

    return randomised(
        UNetMotionModel(
            block_out_channels=(16, 16),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=positions,
        )
    )


def wan(seed: int = 0, **options: object) -> nn.Module:
    """Returns a WanTransformer3DModel of two blocks, two heads of 12 channels."""
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 8, "freq_dim": 16}
    channels = {"in_channels": 4, "out_channels": 4, "rope_max_seq_len": 64}
    return randomised(WanTransformer3DModel(**{**sizes, **channels, **options}), seed)

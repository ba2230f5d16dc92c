"""A streaming model of a few hundred thousand values."""

from pathlib import Path

import torch

from vstar_engine.config.models import ImageSpec, Spec, StreamingSpec, TextSpec, UNetSpec, VaeSpec
from vstar_engine.weights import random_checkpoint
from vstar_engine.weights.convert_child import convert_here

SPEC = Spec(
    "streaming-tiny",
    UNetSpec(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0, 1),
        head_dim=16,
        context_dim=32,
        fps_condition=False,
        norm_groups=8,
        image_tokens=4,
    ),
    VaeSpec(channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8),
    TextSpec(width=32, heads=2, layers=3),
    size=(32, 48),
    streaming=StreamingSpec(ImageSpec(size=28, width=32, layers=2, heads=2, out=32), pixel_channels=(8, 16), resampler=24),
)


def tiny_weights(folder: Path) -> Path:
    """Converts random weights of the tiny model into `folder` / weights."""
    random_checkpoint.write(SPEC, folder / "tiny.ckpt", seed=1, dtype=torch.float32)
    (folder / "weights").mkdir()
    convert_here(folder / "tiny.ckpt", folder / "weights", SPEC.name, "float32", 2**29, lambda **_: None, {})
    return folder / "weights"

"""FP8 calibration: the largest input of each layer, over a short clip."""

import torch
from torch import Tensor

from vstar_engine.config.models import Spec
from vstar_engine.config.sampling import Sampling, Tar
from vstar_engine.networks.fp8 import watched
from vstar_engine.networks.unet import UNet
from vstar_engine.prompting.embeddings import Encode
from vstar_engine.prompting.interpolation import spread

from .ddim import sample
from .schedule import Schedule
from .tar import table

# the clip that is sampled for calibration
FRAMES, STEPS = 8, 8
PROMPTS = ("a landscape covered in thick snow, bare trees", "a lush green meadow in full spring")


@torch.inference_mode()
def calibrate(unet: UNet, spec: Spec, encode: Encode) -> dict[str, float]:
    """Samples a fixed short clip and returns the largest input of each layer."""
    states, negative = spread(encode(PROMPTS), FRAMES)[None], encode([""])[None]
    device, dtype = states.device, states.dtype
    cells = (side // spec.vae.factor for side in spec.size)
    generator = torch.Generator().manual_seed(0)
    tape = torch.randn(STEPS + 1, 1, spec.unet.in_channels, FRAMES, *cells, generator=generator, dtype=torch.float32)
    fps = torch.full((1,), Sampling.fps_condition, device=device)

    def denoise(x: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor]:
        g = table(Tar(), spec.unet.levels, FRAMES, index).to(device)
        cond, uncond = (unet(x.to(dtype), timestep[:, None], text, fps, g).float() for text in (states, negative))
        return cond, uncond

    schedule = Schedule.ddim(STEPS, noise=spec.noise)
    with watched(unet) as largest:
        for _ in sample(denoise, schedule, tape[0].to(device), guidance=Sampling.guidance, noise=tape[1:]):
            pass
    return largest

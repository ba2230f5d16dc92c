"""Makes the tables of frame pairs that a dial's settings mean for a clip."""

import math

import torch

from vstar_engine.kernels.problems import FrameTables
from vstar_engine.sampling.tar import toeplitz

from .settings import DialSettings


def frame_tables(settings: DialSettings, frames: int, tokens: int, device: torch.device | str = "cpu") -> FrameTables | None:
    """Returns the rule of `frames` latent frames of `tokens` tokens; None where nothing differs from plain attention.

    `reference` w: b[f, 0] = ln(w) for f > 0. `decay`: positive logits beyond half the trained window, in tokens, are
    multiplied, and frame 0 does not attend to frames past the window (UltraViCo, arXiv 2511.20123); it acts on clips longer
    than `trained_frames`. `tar`: g of its level 0.
    """
    b = torch.zeros(frames, frames)
    decay, beyond, g = 1.0, -1, None
    if settings.reference != 1.0:
        b[1:, 0] = math.log(settings.reference) if settings.reference > 0 else -math.inf
    trained = settings.trained_frames
    if settings.decay != 1.0 and trained is not None and frames > trained:
        decay, beyond = settings.decay, trained * tokens // 2
        b[0, trained + 1 :] = -math.inf
    if settings.tar is not None and settings.tar.strength != 0.0:
        g = toeplitz(frames, settings.tar.sigma[0], settings.tar.strength).to(device)
    bias = b.to(device) if b.any() else None
    if g is None and bias is None and beyond < 0:
        return None
    return FrameTables(None, g, bias, decay, beyond)

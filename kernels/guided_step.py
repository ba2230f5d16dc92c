"""Guidance and the sampler's update: e = e_u + w (e_c - e_u), the finished latents that it implies, and the next latents.

By PyTorch's operators this is a dozen passes over the latents; here predictions, latents and fresh noise are read once and both
answers written. Arithmetic is in the latents' dtype whatever the predictions'. A program of the Triton kernel takes a block of
neighbouring values of one video, whose coefficients are its own. On a CPU the definition serves: beside the network the update
is less than a thousandth of a step there.
"""

import torch
from torch import Tensor

from .dispatch import triton_serves

# a video's numbers at a step, in this order: with x0 = out * (x - spread * e) * inverse + skip * x, the next latents are
# kept * x0 + direction * e + sigma * noise
COEFFICIENTS = ("guidance", "spread", "inverse", "out", "skip", "kept", "direction", "sigma")


def guided_step_ref(latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the definition."""
    axes = (1,) * (latents.dim() - 1)
    guidance, spread, inverse, out, skip, kept, direction, sigma = coefficients.unflatten(0, (-1, *axes)).unbind(-1)
    cond, uncond = eps[: len(latents)].to(latents), eps[plain].to(latents)
    e = uncond + guidance * (cond - uncond)
    clean = out * ((latents - spread * e) * inverse) + skip * latents
    return kept * clean + direction * e + sigma * noise, clean


@torch.library.custom_op("vstar::guided_step", mutates_args=())
def _guided_step(latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    videos = len(latents)
    if eps.shape[1:] != latents.shape[1:] or len(eps) < videos:
        raise ValueError(f"predictions are {videos} or more like the latents {tuple(latents.shape)}, got {tuple(eps.shape)}")
    if plain.shape != (videos,) or plain.dtype != torch.int64:
        raise ValueError(f"plain names a prediction for each of {videos} videos, int64, got {plain.dtype} {tuple(plain.shape)}")
    if coefficients.shape != (videos, len(COEFFICIENTS)) or coefficients.dtype != latents.dtype:
        wanted = f"coefficients are ({videos}, {len(COEFFICIENTS)}) {latents.dtype}"
        raise ValueError(f"{wanted}, got {tuple(coefficients.shape)} {coefficients.dtype}")
    if noise.shape != latents.shape or noise.dtype != latents.dtype:
        raise ValueError(f"noise is {tuple(latents.shape)} {latents.dtype}, got {tuple(noise.shape)} {noise.dtype}")
    if triton_serves(latents):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.guided_step import guided_step_triton

        return guided_step_triton(latents.contiguous(), eps.contiguous(), plain, coefficients.contiguous(), noise.contiguous())
    return guided_step_ref(latents, eps, plain, coefficients, noise)


@_guided_step.register_fake
def _(latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return latents.new_empty(latents.shape), latents.new_empty(latents.shape)


def guided_step(latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Takes each video a step further: (latents, finished latents), like `latents` (B, ...).

    eps (B or more, ...): row i is the conditional prediction of video i, row plain[i] the unconditional one; plain[i] = i
    without guidance. coefficients (B, 8) as COEFFICIENTS names them, in the latents' dtype; noise like latents. Gradients take
    the definition.
    """
    given = latents, eps, plain, coefficients, noise
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return guided_step_ref(*given) if wanted or torch.compiler.is_compiling() else torch.ops.vstar.guided_step(*given)

"""Guidance and the sampler's update: e = e_u + w (e_c - e_u), the clean latents that it implies, and the next latents.

By PyTorch's operators this is a dozen passes over the latents. Here predictions, latents and fresh noise are read once, and
both results are written once; a multistep solver reads the clean latents of earlier steps besides. Arithmetic is in the
latents' dtype, whatever the predictions' dtype. A program of the Triton kernel takes a block of neighbouring values of one
video and that video's coefficients. On a CPU the definition runs: beside the network the update is less than a thousandth of a
step there.
"""

import torch
from torch import Tensor

from .dispatch import triton_serves

# a video's numbers at a step, in this order: with x0 = out * (x - spread * e) * inverse + skip * x, the next latents are
# kept * x0 + direction * e + sigma * noise; behind them stand the weights of the history's x0, which are added
COEFFICIENTS = ("guidance", "spread", "inverse", "out", "skip", "kept", "direction", "sigma")


def guided_step_ref(
    latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the definition."""
    axes = (1,) * (latents.dim() - 1)
    guidance, spread, inverse, out, skip, kept, direction, sigma, *past = coefficients.unflatten(0, (-1, *axes)).unbind(-1)
    cond, uncond = eps[: len(latents)].to(latents), eps[plain].to(latents)
    e = uncond + guidance * (cond - uncond)
    clean = out * ((latents - spread * e) * inverse) + skip * latents
    after = kept * clean + direction * e + sigma * noise
    for weight, x0 in zip(past, () if history is None else history.unbind(1), strict=True):
        after = after + weight * x0
    return after, clean


@torch.library.custom_op("vstar::guided_step", mutates_args=())
def _guided_step(
    latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    videos, wanted = len(latents), (len(latents), len(COEFFICIENTS) + (0 if history is None else history.shape[1]))
    if eps.shape[1:] != latents.shape[1:] or len(eps) < videos:
        raise ValueError(f"eps must be {videos} or more like the latents {tuple(latents.shape)}, got {tuple(eps.shape)}")
    if plain.shape != (videos,) or plain.dtype != torch.int64:
        raise ValueError(f"plain must be ({videos},) torch.int64, got {tuple(plain.shape)} {plain.dtype}")
    if coefficients.shape != wanted or coefficients.dtype != latents.dtype:
        found = f"{tuple(coefficients.shape)} {coefficients.dtype}"
        raise ValueError(f"coefficients must be {wanted} {latents.dtype}, got {found}")
    if noise.shape != latents.shape or noise.dtype != latents.dtype:
        raise ValueError(f"noise must be {tuple(latents.shape)} {latents.dtype}, got {tuple(noise.shape)} {noise.dtype}")
    if history is not None and (
        (videos, *history.shape[2:]) != latents.shape or len(history) != videos or history.dtype != latents.dtype
    ):
        found = f"{tuple(history.shape)} {history.dtype}"
        raise ValueError(f"history must be (B, depth, ...) like latents {tuple(latents.shape)} {latents.dtype}, got {found}")
    if triton_serves(latents):
        # imported here: a machine without Triton computes on its CPU
        from vstar_engine.kernels.gpu.guided_step import guided_step_triton

        whole = (None if x is None else x.contiguous() for x in (eps, plain, coefficients, noise, history))
        return guided_step_triton(latents.contiguous(), *whole)
    return guided_step_ref(latents, eps, plain, coefficients, noise, history)


@_guided_step.register_fake
def _(
    latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return latents.new_empty(latents.shape), latents.new_empty(latents.shape)


def guided_step(
    latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Applies guidance and one sampling step; returns the next latents and the clean latents, both like `latents` (B, ...).

    eps (B or more, ...) holds predicted noise: row i is video i's conditional one, row plain[i] its unconditional one. plain is
    (B,) int64; plain[i] = i disables guidance. coefficients is (B, 8 + depth) in the latents' dtype, its columns named by
    COEFFICIENTS. noise is like the latents. history (B, depth, ...) holds the clean latents of earlier steps, the newest first;
    depth is 0 without it. With gradients the definition runs. Raises ValueError for other shapes or dtypes.
    Guidance, arXiv 2207.12598; DDIM, arXiv 2010.02502, eq. 12; multistep solvers, `sampling.solvers`.
    """
    given = latents, eps, plain, coefficients, noise, history
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return guided_step_ref(*given) if wanted or torch.compiler.is_compiling() else torch.ops.vstar.guided_step(*given)

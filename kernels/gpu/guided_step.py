"""Triton kernel of `vstar::guided_step`: a program takes a block of neighbouring values of one video."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# values that a program makes: eight a thread, so that half precision is read 16 bytes at a time, and float32 twice that
BLOCK = 1024
WARPS = 4


@triton.jit
def guided_step_kernel(
    latents,
    predicted,
    plain,
    coefficients,
    noise,
    history,
    after,
    clean,
    count,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    video = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    here = video * count + at
    guidance = tl.load(coefficients + video * WIDTH)
    spread = tl.load(coefficients + video * WIDTH + 1)
    inverse = tl.load(coefficients + video * WIDTH + 2)
    share = tl.load(coefficients + video * WIDTH + 3)
    skip = tl.load(coefficients + video * WIDTH + 4)
    kept = tl.load(coefficients + video * WIDTH + 5)
    direction = tl.load(coefficients + video * WIDTH + 6)
    sigma = tl.load(coefficients + video * WIDTH + 7)
    x = tl.load(latents + here, mask=inside).to(tl.float32)
    cond = tl.load(predicted + here, mask=inside).to(tl.float32)
    uncond = tl.load(predicted + tl.load(plain + video) * count + at, mask=inside).to(tl.float32)
    e = uncond + guidance * (cond - uncond)
    x0 = share * ((x - spread * e) * inverse) + skip * x
    fresh = tl.load(noise + here, mask=inside).to(tl.float32)
    made = kept * x0 + direction * e + sigma * fresh
    for past in tl.static_range(DEPTH):
        weight = tl.load(coefficients + video * WIDTH + WIDTH - DEPTH + past)
        made += weight * tl.load(history + (video * DEPTH + past) * count + at, mask=inside).to(tl.float32)
    tl.store(after + here, made.to(after.dtype.element_ty), mask=inside)
    tl.store(clean + here, x0.to(clean.dtype.element_ty), mask=inside)


def guided_step_triton(
    latents: Tensor, eps: Tensor, plain: Tensor, coefficients: Tensor, noise: Tensor, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launches on contiguous arguments as of `guided_step`."""
    after, clean = torch.empty_like(latents), torch.empty_like(latents)
    count = latents[0].numel()
    grid = (triton.cdiv(count, BLOCK), len(latents))
    with torch.cuda.device_of(latents):
        guided_step_kernel[grid](
            *(latents, eps, plain, coefficients, noise, history, after, clean, count),
            BLOCK=BLOCK,
            WIDTH=coefficients.shape[1],
            DEPTH=0 if history is None else history.shape[1],
            num_warps=WARPS,
        )
    return after, clean

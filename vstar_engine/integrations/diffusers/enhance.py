"""Enhance-A-Video's factor of an attention's output (arXiv 2502.07508)."""

import torch
from torch import Tensor

# logits of a run of positions, in bytes
LOGITS_BYTES = 64 * 2**20


def enhancement(q: Tensor, k: Tensor, tokens: int, weight: float) -> Tensor:
    """Returns max(1, mean * (F + weight)) of q, k (B, F * tokens, heads, head_dim): (B, 1, 1, 1) float32.

    `mean` is that of the off-diagonal entries of softmax(q @ k.mT * head_dim**-0.5) over the frames of each position and
    head. The published code takes it over a whole batch; here each video has its own, so that guidance may be batched.
    """
    batch, count, heads, head_dim = q.shape
    frames = count // tokens
    if frames == 1:
        return q.new_ones(batch, 1, 1, 1, dtype=torch.float32)
    # (B, tokens, heads, F, D)
    q, k = (x.unflatten(1, (frames, tokens)).permute(0, 2, 3, 1, 4) for x in (q, k))
    total = q.new_zeros(batch, dtype=torch.float32)
    run = max(1, LOGITS_BYTES // (4 * batch * heads * frames * frames))
    for first in range(0, tokens, run):
        here = slice(first, first + run)
        probs = torch.softmax(q[:, here].float() @ k[:, here].float().mT * head_dim**-0.5, dim=-1)
        total += probs.sum((1, 2, 3, 4)) - probs.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3))
    mean = total / (tokens * heads * frames * (frames - 1))
    return (mean * (frames + weight)).clamp(min=1.0)[:, None, None, None]

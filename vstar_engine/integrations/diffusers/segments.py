"""Additive tables of frame pairs by the pipeline's own attention: a call for each segment of keys, combined exactly.

softmax over all keys with a constant added to each segment is the mean of the segments' results, weighted by the softmax of
their log-sum-exps plus the constants. Right where a table has few values: a call for each value in each group of equal rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# q, k, v (B, N, heads, head_dim) -> the result, alike, and the log-sum-exp of each row's logits (B, heads, N)
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def groups(values: Tensor) -> list[Tensor]:
    """Returns the indices of equal entries (or rows) of `values`, group by group."""
    _, which = torch.unique(values, dim=0, return_inverse=True)
    return [(which == i).nonzero()[:, 0] for i in range(int(which.max()) + 1)]


class Segment(NamedTuple):
    """Queries whose frames have equal rows of a table, and their groups of keys, each with what is added to its logits."""

    queries: Tensor | slice
    keys: list[tuple[Tensor | slice, float]]


def segments_of(b: Tensor, tokens: int) -> list[Segment]:
    """Plans the calls for a table (F, F) of frames of `tokens` tokens; excluded pairs are left out."""
    table, device = b.cpu(), b.device
    plan = []
    for frames in groups(table):
        row = table[frames[0]]
        keys = [(_tokens_of(group, tokens, device), float(row[group[0]])) for group in groups(row)]
        plan.append(Segment(_tokens_of(frames, tokens, device), [pair for pair in keys if pair[1] > -math.inf]))
    return plan


def by_segments(q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Segment], attend: Attend) -> Tensor:
    """Returns softmax(q @ k.mT * head_dim**-0.5 + b[f_q, f_k]) @ v, (B, F * tokens, heads, head_dim), for a table's plan."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for queries, keys in plan:
        made = [attend(q[:, queries], k[:, here], v[:, here]) for here, _ in keys]
        totals = torch.stack([total.float() + added for (_, total), (_, added) in zip(made, keys, strict=True)])
        share = torch.softmax(totals, dim=0).transpose(2, 3)[..., None]
        out[:, queries] = (torch.stack([result for result, _ in made]).float() * share).sum(0).to(q.dtype)
    return out


def _tokens_of(frames: Tensor, tokens: int, device: torch.device) -> Tensor | slice:
    """Returns the tokens of frames, as a slice where the frames are neighbours."""
    first, last = int(frames[0]), int(frames[-1])
    if last - first + 1 == len(frames):
        return slice(first * tokens, (last + 1) * tokens)
    return (frames[:, None] * tokens + torch.arange(tokens)).flatten().to(device)


def attend_by(processor: Any) -> Attend:
    """Returns the attention of a processor's backend with its log-sum-exp; on a CPU, PyTorch's flash attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if q.device.type == "cpu":
            heads_first = [x.transpose(1, 2) for x in (q, k, v)]
            out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
            return out.transpose(1, 2), total
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        backend = getattr(processor, "_attention_backend", None)
        out, total = dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True}, backend=backend)
        total = total.flatten(2) if total.dim() == 4 else total
        # backends differ in the order of rows and heads
        return out, total if total.shape[1] == q.shape[2] else total.transpose(1, 2)

    return attend

"""Maps of temporal attention, read from a network while it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.temporal_attention import temporal_attention_probs
from vstar_engine.networks.blocks import Stage, TemporalTransformer
from vstar_engine.networks.layers import SelfAttention
from vstar_engine.networks.unet import UNet

# the place of `tar` among the arguments of `UNet.forward`
TAR = 4


@dataclass
class Attention:
    """One temporal attention of pass `step` (from 0) at a level.

    `probs` (B, positions, T, T) is the mean over heads; of the scaled logits before the regulariser: `positive`, the share of
    rows whose maximum is above 0 (there TAR sharpens), their mean `row_max`, and `spread`, the mean deviation within a row.
    """

    step: int
    level: int
    probs: Tensor
    positive: float
    row_max: float
    spread: float


@dataclass
class Recording:
    """The attentions of every recorded pass, in the network's order; `tar` is that of the last pass."""

    attentions: list[Attention] = field(default_factory=list)
    passes: int = 0
    tar: Tensor | None = None


@contextmanager
def recorded(unet: UNet, positions: Sequence[int]) -> Iterator[Recording]:
    """Records temporal attention of each pass in the block, at `positions` (indices into a level's H*W, modulo its size).

    `tar` must be rows (1 or B, levels, T). The stem's attention is not recorded.
    """
    recording = Recording()
    handles = [unet.register_forward_pre_hook(_keep_tar(recording), with_kwargs=True)]
    for stage in unet.modules():
        if not isinstance(stage, Stage):
            continue
        for layer in stage:
            if isinstance(layer, TemporalTransformer):
                for attention in layer.modules():
                    if isinstance(attention, SelfAttention):
                        handles.append(
                            attention.to_qkv.register_forward_hook(_read(recording, attention, stage.level, positions))
                        )
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _keep_tar(recording: Recording) -> Any:
    def hook(module: UNet, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        recording.tar = kwargs["tar"] if "tar" in kwargs else args[TAR]
        recording.passes += 1

    return hook


def _read(recording: Recording, attention: SelfAttention, level: int, positions: Sequence[int]) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], qkv: Tensor) -> None:
        assert recording.tar is not None
        q, k, _ = qkv.unflatten(-1, (3, attention.heads, attention.head_dim)).unbind(-3)  # (B, T, P, heads, head_dim)
        taken = [p % q.shape[2] for p in positions]
        logits = torch.einsum("btphd,bsphd->bphts", q[:, :, taken].float(), k[:, :, taken].float()) * attention.head_dim**-0.5
        top = logits.amax(-1)
        probs = temporal_attention_probs(q, k, recording.tar[:, level], taken)
        positive, spread = float((top > 0).float().mean()), float(logits.std(-1).mean())
        recording.attentions.append(Attention(recording.passes - 1, level, probs, positive, float(top.mean()), spread))

    return hook


def entropy(probs: Tensor) -> float:
    """Returns the mean perplexity exp(H) of attention rows: the effective number of frames attended to."""
    return float(F.relu(-(probs * probs.clamp_min(1e-12).log()).sum(-1)).exp().mean())

"""What a video does over time: similarity of frames against their distance, scene cuts, and attention over the frames.

Similarity matrices are (T, T) with ones on the diagonal; the paper draws them with DreamSim (arXiv 2403.13501, Fig. 8, S.1).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.kernels.temporal_attention import temporal_attention_probs
from vstar_engine.networks.blocks import Stage, TemporalTransformer
from vstar_engine.networks.layers import SelfAttention
from vstar_engine.networks.unet import UNet

CELL = 8
CUT_LEVEL, CUT_RATIO = 0.12, 4.0


def pixels(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, D) float32: means of 8x8 pixels around mid grey, so that a cosine tells bright from dark."""
    count, height, width, _ = frames.shape
    cells = frames[:, : height - height % CELL, : width - width % CELL].astype(np.float32) / 127.5 - 1.0
    cells = cells.reshape(count, height // CELL, CELL, width // CELL, CELL, 3).mean((2, 4))
    return cells.reshape(count, -1)


@cache
def _dreamsim() -> tuple[Any, Any]:
    try:
        from dreamsim import dreamsim as load_dreamsim
    except ImportError as error:
        raise ImportError("the DreamSim measure needs the dreamsim package: pip install dreamsim") from error
    return load_dreamsim(pretrained=True, device="cpu")


def dreamsim(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, D) embeddings of the paper's measure; ImportError says what to install."""
    from PIL import Image

    model, preprocess = _dreamsim()
    with torch.inference_mode():
        return np.concatenate([model.embed(preprocess(Image.fromarray(frame))).numpy() for frame in frames])


def cosine(features: np.ndarray) -> np.ndarray:
    """(T, D) features -> (T, T) cosine similarity."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def overlap(shares: np.ndarray) -> np.ndarray:
    """(T, K) shares that sum to one -> (T, T): the part that two frames have in common."""
    return np.minimum(shares[:, None], shares[None]).sum(-1)


def by_interval(similarity: np.ndarray) -> np.ndarray:
    """(T, T) -> (T,): mean similarity of frames `d` apart, for d = 0 .. T-1."""
    return np.array([np.diagonal(similarity, d).mean() for d in range(len(similarity))])


def neighbours(similarity: np.ndarray) -> float:
    """Coherence: the mean similarity of neighbouring frames."""
    return float(np.diagonal(similarity, 1).mean())


def dynamics(similarity: np.ndarray) -> float:
    """How different frames at least half the video apart are: one minus their mean similarity."""
    return float(1.0 - by_interval(similarity)[len(similarity) // 2 :].mean())


def scene_cuts(frames: np.ndarray) -> list[int]:
    """Frames that begin a new scene: their mean change is above 0.12 of full scale and four times the video's median change."""
    changes = np.abs(np.diff(pixels(frames), axis=0)).mean(1) / 2.0
    return [int(i) + 1 for i in np.flatnonzero((changes > CUT_LEVEL) & (changes > CUT_RATIO * np.median(changes)))]


@dataclass
class Attention:
    """What one temporal attention did in pass `step` (from 0) at a level.

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
    """The attentions of every pass that ran while recording, in the network's order; `tar` is what the last was given."""

    attentions: list[Attention] = field(default_factory=list)
    passes: int = 0
    tar: Tensor | None = None


@contextmanager
def recorded(unet: UNet, positions: Sequence[int]) -> Iterator[Recording]:
    """Records temporal attention at some positions (indices into H*W of the level, taken modulo it) of each pass in the block.

    Takes (1 or B, levels, T) rows of `tar`; the stem's attention is not among them.
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
        recording.tar = kwargs["tar"] if "tar" in kwargs else args[-1]
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
    """Mean entropy of attention rows as an effective number of frames attended to: exp(H)."""
    return float(F.relu(-(probs * probs.clamp_min(1e-12).log()).sum(-1)).exp().mean())

"""Attention to the texts of a timeline: a UNet's frames each have their text, Wan's mix the states' keys and values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .mounting import Processor


@dataclass
class Texts:
    """What is in force in a call: the frames' texts of a UNet, or weights or biases (F, K) of Wan's states."""

    rows: Tensor | None = None
    weights: Tensor | None = None
    bias: Tensor | None = None
    tokens: int = 1
    length: int = 1


class FrameTexts(Processor):
    """A UNet's attention to text, by the processor that was there, with a text for each frame."""

    def __init__(self, inner: Any, texts: Texts):
        super().__init__(inner)
        self.texts = texts

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.texts.rows
        given = encoder_hidden_states if rows is None else rows.to(encoder_hidden_states.dtype)
        return self.inner(attn, hidden_states, given, *args, **kwargs)


class MixedTexts(Processor):
    """Wan's attention to K texts: their keys (after their norm) and values are mixed by each frame's weights.

    With biases instead of weights every frame attends to all texts at once, by biased logits (Prompt Relay).
    Image tokens, which come first, are attended to by all frames alike.
    """

    def __init__(self, inner: Any, texts: Texts):
        super().__init__(inner)
        self.texts = texts

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        texts = self.texts
        table = texts.weights if texts.bias is None else texts.bias
        if table is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        frames, states = table.shape
        image, text = encoder_hidden_states.tensor_split([encoder_hidden_states.shape[1] - states * texts.length], dim=1)
        # (B * F, heads, tokens, D): a frame's tokens attend to that frame's text
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(-1, (attn.heads, -1))
        by_frame = q.unflatten(1, (frames, texts.tokens)).flatten(0, 1).transpose(1, 2)
        k, v = attn.norm_k(attn.to_k(text)), attn.to_v(text)
        mask = None
        if texts.bias is None:
            k, v = (_mixed(x, table, texts.length) for x in (k, v))
        else:
            k, v = (x.repeat_interleave(frames, dim=0) for x in (k, v))
            mask = table.repeat_interleave(texts.length, dim=1).repeat(len(q), 1)[:, None, None].to(q.dtype)
        k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (k, v))
        out = (
            scaled_dot_product_attention(by_frame, k, v, attn_mask=mask)
            .transpose(1, 2)
            .unflatten(0, (-1, frames))
            .flatten(1, 2)
        )
        if attn.add_k_proj is not None:
            k, v = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
            k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (k, v))
            out = out + scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(hidden_states)))


def _mixed(x: Tensor, weights: Tensor, length: int) -> Tensor:
    """Mixes K texts of `length` tokens: (B, K * length, C) -> (B * F, length, C) by weights (F, K)."""
    states = x.unflatten(1, (weights.shape[1], length))
    return torch.einsum("fk,bklc->bflc", weights.to(x.dtype), states).flatten(0, 1)

"""The appearance preservation module: tokens of an anchor frame, mixed into the text of every cross-attention.

StreamingT2V, arXiv 2403.14773.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import CrossAttention

TEXT_TOKENS = 77


class Resampler(nn.Module):
    """Makes image tokens of the embedding of anchor frames."""

    def __init__(self, width: int, inner: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.context_embedding = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, tokens * width))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, anchors, width) -> (B, tokens, width); several anchors are averaged."""
        return self.context_embedding(embeddings.mean(dim=1)).unflatten(-1, (self.tokens, -1))


class MixedCrossAttention(CrossAttention):
    """Cross-attention to a text that a convolution over text and image tokens is added to.

    The gate SiLU(alpha) starts at 0. The convolution runs along the features; tokens are its channels.
    """

    def __init__(self, width: int, context_dim: int, heads: int, head_dim: int, image_tokens: int):
        super().__init__(width, context_dim, heads, head_dim)
        self.conv = nn.Conv1d(TEXT_TOKENS + image_tokens, TEXT_TOKENS, 3, padding=1)
        self.conv_ln = nn.LayerNorm(context_dim)
        self.alpha = nn.Parameter(torch.zeros(()))

    def mix(self, context: Tensor) -> Tensor:
        """Text and image tokens (N, 77 + image tokens, C) -> (N, 77, C).

        Raises ValueError for another number of tokens.
        """
        if context.shape[1] != self.conv.in_channels:
            raise ValueError(
                f"a context is {TEXT_TOKENS} text tokens and {self.conv.in_channels - TEXT_TOKENS} image tokens, "
                f"got {context.shape[1]} in all"
            )
        return context[:, :TEXT_TOKENS] + F.silu(self.alpha) * self.conv_ln(self.conv(context))

    def project(self, context: Tensor) -> Tensor:
        return super().project(self.mix(context))


def with_image(text: Tensor, image: Tensor) -> Tensor:
    """Text (B, 1 or T, 77, C) and image tokens (B, tokens, C) -> (B, 1 or T, 77 + tokens, C), text first."""
    return torch.cat([text, image[:, None].expand(-1, text.shape[1], -1, -1)], dim=2)

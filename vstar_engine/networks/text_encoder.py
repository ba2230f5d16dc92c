"""The OpenCLIP text tower: tokens to the embeddings that cross-attention reads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_engine.config.models import TextSpec


class Attention(nn.Module):
    """Self-attention with OpenCLIP's parameter names."""

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, 77, head_dim)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, causal)
        self.ln_2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, spec: TextSpec):
        super().__init__()
        # the penultimate layer's output is wanted, so the last block is never built
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(spec.width, spec.heads) for _ in range(spec.layers - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class TokenEmbedding(nn.Embedding):
    """An embedding that draws no numbers on the meta device, where that would import PyTorch's compiler, a second or more."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class TextTower(nn.Module):
    """OpenCLIP's text transformer up to its penultimate layer, then the final norm; no projection."""

    def __init__(self, spec: TextSpec):
        super().__init__()
        self.spec = spec
        # keys of the official tower that text-to-video does not need
        self.unused = (f"transformer.resblocks.{spec.layers - 1}.", "text_projection", "logit_scale")
        self.token_embedding = TokenEmbedding(spec.vocab_size, spec.width)
        self.positional_embedding = nn.Parameter(torch.empty(spec.context_length, spec.width))
        self.transformer = Transformer(spec)
        self.ln_final = nn.LayerNorm(spec.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, 77) int -> (n, 77, width)."""
        return self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding))

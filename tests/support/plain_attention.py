"""Temporal attention as published, in plain PyTorch: in the inputs' own dtype and in float64."""

from torch import Tensor

from vstar_engine.kernels.temporal_attention import temporal_attention_dense_ref


def by_eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The published steps in the inputs' own dtype."""
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))
    phi = q @ k.mT * q.shape[-1] ** -0.5
    phi = phi + phi.amax(-1, keepdim=True) * bias.to(phi.dtype)[:, None, None]
    return (phi.softmax(-1) @ v).permute(0, 3, 1, 2, 4)


def exactly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return temporal_attention_dense_ref(q.double(), k.double(), v.double(), bias.double())

"""Ways to compute temporal attention: the published passes, PyTorch's own attentions with the bias, and ours.

Each starts from q, k and v in the problem's layout and ends in it. `fused` is what a network has: views of one projection,
(B, T, P, heads, head_dim), so whoever wants sequences of heads copies them out and back. `split` gives each of them exactly
that, (B, P, heads, T, head_dim) in memory, so nobody copies.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from vstar_engine.bench.harness.contest import NotHere
from vstar_engine.errors import MissingLibrary
from vstar_engine.kernels.cpu import library
from vstar_engine.kernels.temporal_attention import temporal_attention, temporal_attention_dense, toeplitz_bias
from vstar_engine.sampling.tar import toeplitz

LAYOUTS = ("fused", "split")
# q, k, v as (N, T, head_dim), one sequence a row -> the same
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """q, k, v (B, T, P, heads, head_dim) laid out as `layout` says; g (1, T) of `sigma`, and the same as a (T, T) matrix.

    `compiler` is torch.compile's back end for those who compile.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    bias: Tensor
    sigma: float
    layout: str
    compiler: str = "inductor"

    @staticmethod
    def random(
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        layout: str,
        sigma: float,
        compiler: str = "inductor",
    ) -> "Problem":
        """Draws q, k and v; shape is (B, T, P, heads, head_dim)."""
        batch, frames, positions, heads, width = shape
        if layout == "fused":
            q, k, v = torch.randn(batch, frames, positions, 3, heads, width, device=device).to(dtype).unbind(3)
        else:
            drawn = (torch.randn(batch, positions, heads, frames, width, device=device).to(dtype) for _ in range(3))
            q, k, v = (x.permute(0, 3, 1, 2, 4) for x in drawn)
        g = toeplitz(frames, sigma)[None].to(device)
        return Problem(q, k, v, g, toeplitz_bias(g, frames, frames)[0], sigma, layout, compiler)

    def to(self, dtype: torch.dtype) -> "Problem":
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


def split_heads(x: Tensor) -> Tensor:
    """(B, T, P, H, D) -> (B * P * H, T, D), copied unless it lies so in memory."""
    return x.permute(0, 2, 3, 1, 4).flatten(0, 2).contiguous()


def merge_heads(x: Tensor, shape: torch.Size, layout: str) -> Tensor:
    """(B * P * H, T, D) -> `shape` (B, T, P, H, D), copied where the layout is fused."""
    batch, frames, positions, heads, width = shape
    out = x.view(batch, positions, heads, frames, width).permute(0, 3, 1, 2, 4)
    return out.contiguous() if layout == "fused" else out


def around(core: Core, problem: Problem) -> Callable[[], Tensor]:
    """Binds a core to a problem, with the copies that its layout costs."""

    def call() -> Tensor:
        q, k, v = (split_heads(x) for x in (problem.q, problem.k, problem.v))
        return merge_heads(core(q, k, v), problem.q.shape, problem.layout)

    return call


def gaussian_on_host(frames: int, sigma: float, like: Tensor) -> Tensor:
    """Builds the (T, T) bias on the host and sends it over, as the published model does in every call."""
    distance = np.abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    return torch.from_numpy(np.exp(-(distance**2) / (2.0 * sigma**2))).to(like)


def published_core(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes the published passes: scale, an unused softmax, row max, bias, sum, softmax, and the heads' mean.

    Without a bias the layer is plain: one softmax, and the map.
    """
    phi = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
    probs = phi.softmax(dim=-1)
    if bias is not None:
        probs = (phi + phi.amax(dim=-1, keepdim=True) * bias).softmax(dim=-1)
    kept = probs.view(-1, heads, *probs.shape[1:]).mean(dim=1)
    return torch.einsum("bij,bjd->bid", probs, v), kept


def clean_core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Computes the same without waste: the bias is given, and only what is used is computed or stored."""
    phi = q @ k.mT * q.shape[-1] ** -0.5
    return (phi + phi.amax(dim=-1, keepdim=True) * bias).softmax(dim=-1) @ v


def dense_mask(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Returns the first pass of those that take an additive bias: rowmax * bias, (N, T, T)."""
    return (q @ k.mT).amax(dim=-1, keepdim=True) * (bias * q.shape[-1] ** -0.5)


def rows_aligned(mask: Tensor) -> Tensor:
    """Starts every row of a mask at a multiple of 16 bytes, as xformers wants."""
    missing = -mask.shape[-1] % (16 // mask.itemsize)
    return pad(mask, (0, missing))[..., : mask.shape[-1]] if missing else mask


def sdpa_core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    mask = dense_mask(q, k, bias)
    return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask[:, None])[:, 0]


def published(problem: Problem) -> Callable[[], Tensor]:
    wide = problem.to(torch.float32)
    frames, heads = wide.q.shape[1], wide.q.shape[3]
    return around(lambda q, k, v: published_core(q, k, v, heads, gaussian_on_host(frames, wide.sigma, q))[0], wide)


def clean(problem: Problem) -> Callable[[], Tensor]:
    bias = problem.bias.to(problem.q.dtype)
    return around(lambda q, k, v: clean_core(q, k, v, bias), problem)


def compiled(problem: Problem) -> Callable[[], Tensor]:
    """`clean` as torch.compile's longest search makes it, copies included."""
    bias = problem.bias.to(problem.q.dtype)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = clean_core(split_heads(q), split_heads(k), split_heads(v), bias)
        return merge_heads(out, q.shape, problem.layout)

    mode = "max-autotune-no-cudagraphs" if problem.compiler == "inductor" else None
    fast = torch.compile(whole, backend=problem.compiler, fullgraph=True, dynamic=False, mode=mode)
    return lambda: fast(problem.q, problem.k, problem.v)


def sdpa_dense(problem: Problem) -> Callable[[], Tensor]:
    bias = problem.bias.to(problem.q.dtype)
    return around(lambda q, k, v: sdpa_core(q, k, v, bias), problem)


def sdpa_plain(problem: Problem) -> Callable[[], Tensor]:
    return around(lambda q, k, v: scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0], problem)


def flex(problem: Problem) -> Callable[[], Tensor]:
    """FlexAttention for the row maxima, then again with a score_mod that reads them."""
    try:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention
    except ImportError as error:
        raise MissingLibrary(f"this PyTorch's FlexAttention gives no row maxima ({error})") from error
    if problem.q.device.type == "cpu":
        raise NotHere("PyTorch's FlexAttention gives no row maxima on a CPU")
    attend: Any = torch.compile(flex_attention, backend=problem.compiler, dynamic=False)
    g = problem.g[0]

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q[:, None], k[:, None], v[:, None]
        row_max = attend(q, k, v, return_aux=AuxRequest(max_scores=True))[1].max_scores

        def regularised(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + row_max[batch, head, i] * g[(i - j).abs()]

        return attend(q, k, v, score_mod=regularised)[:, 0]

    return around(core, problem)


def xformers_dense(problem: Problem) -> Callable[[], Tensor]:
    try:
        attend = import_module("xformers.ops").memory_efficient_attention
    except ImportError as error:
        raise MissingLibrary("xformers is not installed") from error
    bias = problem.bias.to(problem.q.dtype)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = rows_aligned(dense_mask(q, k, bias))[:, None]
        return attend(q[:, :, None], k[:, :, None], v[:, :, None], attn_bias=mask)[:, :, 0]

    return around(core, problem)


def check_ours(device: torch.device) -> None:
    """Raises MissingLibrary where the reference in PyTorch would be timed in our name."""
    if device.type == "cpu" and not library.status()[0]:
        raise MissingLibrary(f"the CPU kernel is not built: {library.status()[1]}")
    if device.type == "cuda":
        try:
            import_module("triton")
        except ImportError as error:
            raise MissingLibrary("Triton is not installed") from error


def ours(problem: Problem) -> Callable[[], Tensor]:
    check_ours(problem.q.device)
    return lambda: temporal_attention(problem.q, problem.k, problem.v, problem.g)


def ours_plain(problem: Problem) -> Callable[[], Tensor]:
    check_ours(problem.q.device)
    zero = torch.zeros_like(problem.g)
    return lambda: temporal_attention(problem.q, problem.k, problem.v, zero)


def ours_copied(problem: Problem) -> Callable[[], Tensor]:
    """Ours with the copies that it does not need: heads out before it and back after it."""
    check_ours(problem.q.device)
    shape = problem.q.shape

    def call() -> Tensor:
        q, k, v = (merge_heads(split_heads(x), shape, "split") for x in (problem.q, problem.k, problem.v))
        return temporal_attention(q, k, v, problem.g).clone()

    return call


def ours_dense(problem: Problem) -> Callable[[], Tensor]:
    check_ours(problem.q.device)
    return lambda: temporal_attention_dense(problem.q, problem.k, problem.v, problem.bias[None])


@dataclass(frozen=True)
class Attention:
    """A provider of temporal attention: how it is prepared, and how many T x T tensors it holds at its peak.

    `plain` ones leave the regulariser out; `traced` says whether a CPU's allocations can be followed.
    """

    prepare: Callable[[Problem], Callable[[], Tensor]]
    maps: int = 0
    plain: bool = False
    traced: bool = True


OURS, OURS_PLAIN, PUBLISHED, CLEAN, COMPILED = "ours", "ours, g = 0", "published (fp32)", "clean eager", "clean compiled"
SDPA_PLAIN, SDPA_DENSE, FLEX, XFORMERS = "SDPA without TAR", "SDPA, dense bias", "FlexAttention, two passes", "xformers"
OURS_COPIED = "ours, with copies"
PROVIDERS = {
    OURS: Attention(ours),
    OURS_PLAIN: Attention(ours_plain, plain=True),
    OURS_COPIED: Attention(ours_copied),
    PUBLISHED: Attention(published, maps=6),
    CLEAN: Attention(clean, maps=4),
    COMPILED: Attention(compiled, maps=2, traced=False),
    SDPA_PLAIN: Attention(sdpa_plain, plain=True),
    SDPA_DENSE: Attention(sdpa_dense, maps=3),
    FLEX: Attention(flex, traced=False),
    XFORMERS: Attention(xformers_dense, maps=3),
}
DENSE_PROVIDERS = {OURS: Attention(ours_dense), CLEAN: PROVIDERS[CLEAN], SDPA_DENSE: PROVIDERS[SDPA_DENSE]}

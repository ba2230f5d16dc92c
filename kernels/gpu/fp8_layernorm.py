"""Triton kernel of `vstar::norm_e4m3`: a program holds whole rows in registers, for the two passes of a layer norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_engine.kernels.problems import E4M3

from .fp8_quantize import rounded
from .linear import MOMENTS_WARPS, moments_constants, moments_of


@triton.jit(do_not_specialize=("rows",))
def norm_e4m3_kernel(x, gain, shift, step, out, rows, in_features, eps, R: tl.constexpr, PADDED: tl.constexpr):
    """x and out (rows, in_features), gain and shift (in_features,)."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, PADDED)
    place, inside = r.to(tl.int64)[:, None] * in_features + c[None, :], (r < rows)[:, None] & (c < in_features)[None, :]
    tile = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    _, off, scale = moments_of(tile, c, in_features, eps)
    g, s = tl.load(gain + c, mask=c < in_features, other=0.0), tl.load(shift + c, mask=c < in_features, other=0.0)
    y = off * scale[:, None] * g.to(tl.float32)[None, :] + s.to(tl.float32)[None, :]
    tl.store(out + place, rounded(y, 1.0 / tl.load(step)), mask=inside)


def norm_e4m3_triton(x: Tensor, gain: Tensor, shift: Tensor, eps: float, step: Tensor) -> Tensor:
    """Launches on contiguous x, whose rows are at most LONGEST long."""
    out, in_features = torch.empty(x.shape, dtype=E4M3, device=x.device), x.shape[-1]
    if x.numel():
        rows, held = x.numel() // in_features, moments_constants(in_features)
        with torch.cuda.device_of(x):
            norm_e4m3_kernel[(triton.cdiv(rows, held["R"]),)](
                x, gain, shift, step, out, rows, in_features, eps, **held, num_warps=MOMENTS_WARPS
            )
    return out

"""The bar that our kernels are held to: PyTorch's own error against float64."""

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Holds the largest error of `ours` against float64 to twice that of `eager`, plus one rounding step of its dtype."""
    assert ours.shape == eager.shape == exact.shape
    assert ours.dtype == eager.dtype
    assert exact.dtype == torch.float64
    assert torch.isfinite(ours).all(), "not every element was written with a finite value"
    step = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, eager))
    assert error <= 2 * allowed + step, f"error {error:.3g}, PyTorch's {allowed:.3g}, rounding step {step:.3g}"


def relative_l2(ours: Tensor, golden: Tensor) -> float:
    """||ours - golden|| / ||golden||, or the norm of ours where golden is zero."""
    scale = golden.double().norm().item()
    return (ours.double() - golden.double()).norm().item() / (scale or 1.0)

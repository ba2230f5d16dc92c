"""The bar every kernel is held to: twice PyTorch's own error against float64, plus one rounding step."""

import torch
from torch import Tensor


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in float64, or the norm of `got` where `exact` is zero."""
    return float((got.double() - exact.double()).norm()) / (float(exact.double().norm()) or 1.0)


def assert_as_accurate(ours: Tensor, eager: Tensor, exact: Tensor, slack: float = 0.0) -> None:
    """Holds our error against float64 to twice PyTorch's own in the same dtype, plus one rounding step and `slack`."""
    assert ours.dtype == eager.dtype
    assert ours.shape == eager.shape == exact.shape
    assert exact.dtype == torch.float64
    assert torch.isfinite(ours).all(), "not every element was written with a finite value"
    bar = 2 * relative_error(eager, exact) + torch.finfo(ours.dtype).eps + slack
    error = relative_error(ours, exact)
    assert error <= bar, f"relative error {error:.2e}, at most {bar:.2e}"

"""The bar every kernel is held to: twice PyTorch's own error against float64, plus one rounding step."""

import torch
from torch import Tensor


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_accurate(ours: Tensor, eager: Tensor, exact: Tensor, slack: float = 0.0) -> None:
    """Holds our error against float64 to twice PyTorch's own in the same dtype, plus one rounding step and `slack`."""
    assert ours.dtype == eager.dtype
    assert ours.shape == exact.shape
    bar = 2 * relative_error(eager, exact) + torch.finfo(ours.dtype).eps + slack
    error = relative_error(ours, exact)
    assert error <= bar, f"relative error {error:.2e}, at most {bar:.2e}"

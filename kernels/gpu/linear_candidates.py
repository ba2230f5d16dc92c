"""`vstar::linear` on a GPU in float16 or bfloat16: PyTorch's product and separate passes, or Triton's kernel, by measurement.

cuBLAS's product is hard to beat, and what the kernel spares are the passes around it: which is faster is for the device to say,
and each shape is timed once (`fastest`). PyTorch's alone are products with nothing around them but a bias, which cuBLAS adds
itself, rows that 16-byte accesses or `moments_kernel` do not take whole, and GPUs older than the launch table.
"""

from collections.abc import Callable

from torch import Tensor

from vstar_engine.kernels.linear import LayerNorm, by_operators

from .autotune import fastest
from .device import device
from .linear import LONGEST, Tile, linear_triton, tiles
from .temporal_attention_launch import ARCHITECTURES

# features that 16-byte accesses take whole
MULTIPLE = 16
OPERATORS = "PyTorch"


def name_of(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gate: bool, norm: bool) -> str:
    """Names a case by all that its time depends on."""
    around = {"norm": norm, "bias": bias is not None, "residual": residual is not None, "gate": gate}
    behind = "".join(f", {word}" for word, there in around.items() if there)
    rows, (made, into) = x.numel() // x.shape[-1], weight.shape
    return f"linear {rows}x{into} by {made}{behind}, {str(x.dtype)[6:]} on {x.device}"


def ways(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    norm: LayerNorm | None,
) -> dict[str, Callable[[], Tensor]]:
    """Returns the ways to compute here by name, PyTorch's first."""
    found: dict[str, Callable[[], Tensor]] = {OPERATORS: lambda: by_operators(x, weight, bias, residual, gate, norm)}
    made, into = weight.shape[0] // 2 if gate else weight.shape[0], weight.shape[1]
    arch = device(x).arch
    wide = not made % MULTIPLE and not into % MULTIPLE and (norm is None or into <= LONGEST)
    spared = norm is not None or residual is not None or gate
    if spared and wide and x.numel() and arch >= ARCHITECTURES[0]:
        for tile in tiles(arch, gate):

            def by_triton(tile: Tile = tile) -> Tensor:
                beside = None if residual is None else residual.contiguous()
                gain, shift, eps = norm or (None, None, 0.0)
                return linear_triton(x.contiguous(), weight.contiguous(), bias, beside, gate, gain, shift, eps, tile)

            found[f"Triton, {tile.rows}x{tile.columns}"] = by_triton
    return found


def linear_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: bool,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """Computes by whichever is the fastest here."""
    norm = None if gain is None or shift is None else LayerNorm(gain, shift, eps)
    given = (x, weight, bias, residual, gate)
    return fastest(name_of(*given, norm is not None), ways(*given, norm))

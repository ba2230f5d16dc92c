"""The arguments of the larger ops, each written once, for the op, its schema, its definition and its launchers."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


def schema(problem: type) -> str:
    """Returns the schema of an op that takes a problem's fields and returns a tensor."""

    def op(*given: object) -> None: ...

    signature = inspect.signature(problem)
    fields = [field.replace(default=inspect.Parameter.empty) for field in signature.parameters.values()]
    described: Any = op
    described.__signature__ = signature.replace(parameters=fields, return_annotation=Tensor)
    return torch.library.infer_schema(described, mutates_args=())


def _out_features(weight: Tensor, gate: bool) -> int:
    return weight.shape[0] // 2 if gate else weight.shape[0]


class LayerNorm(NamedTuple):
    """A layer norm over the last axis: weight (in,), bias (in,) and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class LinearProblem(NamedTuple):
    """What `vstar::linear` takes: x (..., in), weight (out, in), bias (out,), a residual like the result.

    A gated weight holds the rows of the values, then those of the gates. `gain`, `shift` and `eps` are a `LayerNorm` of x.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None = None
    gate: bool = False
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0

    @property
    def norm(self) -> LayerNorm | None:
        return None if self.gain is None or self.shift is None else LayerNorm(self.gain, self.shift, self.eps)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.x.shape[:-1], _out_features(self.weight, self.gate))

    def contiguous(self) -> Self:
        residual = None if self.residual is None else self.residual.contiguous()
        return self._replace(x=self.x.contiguous(), weight=self.weight.contiguous(), residual=residual)

    @property
    def case(self) -> str:
        """Returns a name made of all that the time on a GPU depends on."""
        around = {
            "norm": self.gain is not None,
            "bias": self.bias is not None,
            "residual": self.residual is not None,
            "gate": self.gate,
        }
        return _case("linear", self.x, self.weight, around, self.x.dtype)


class Fp8LinearProblem(NamedTuple):
    """What `vstar::linear_e4m3` takes: x (..., in) of `dtype` or rounded, an e4m3 weight (out, in), float32 step and scale.

    bias (out,) and the residual are of `dtype`, and so is the result or, with the step of the FP8 layer that reads it in
    `then`, it is rounded to e4m3. A gated weight holds the rows of the values, then those of the gates.
    """

    x: Tensor
    weight: Tensor
    step: Tensor
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    gate: bool
    then: Tensor | None
    dtype: torch.dtype

    @property
    def rounds(self) -> bool:
        """Returns whether x is not in e4m3 yet."""
        return self.x.dtype != E4M3

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.x.shape[:-1], _out_features(self.weight, self.gate))

    @property
    def out_dtype(self) -> torch.dtype:
        return self.dtype if self.then is None else E4M3

    def contiguous(self) -> Self:
        residual = None if self.residual is None else self.residual.contiguous()
        return self._replace(x=self.x.contiguous(), weight=self.weight.contiguous(), residual=residual)

    @property
    def case(self) -> str:
        """Returns a name made of all that the time on a GPU depends on."""
        around = {
            "rounding": self.rounds,
            "bias": self.bias is not None,
            "residual": self.residual is not None,
            "gate": self.gate,
            "rounding then": self.then is not None,
        }
        return _case("linear_e4m3", self.x, self.weight, around, self.dtype)


class Fp8ConvProblem(NamedTuple):
    """What `vstar::conv_e4m3` takes: e4m3 x (N, H, W, C) and weight (O, kh, kw, C), float32 step and scale, bias (O,)."""

    x: Tensor
    weight: Tensor
    step: Tensor
    scale: Tensor
    bias: Tensor
    stride: int
    padding: Sequence[int]

    @property
    def out_shape(self) -> tuple[int, ...]:
        sides = (
            (side + 2 * beyond - kernel) // self.stride + 1
            for side, beyond, kernel in zip(self.x.shape[1:3], self.padding, self.weight.shape[1:3], strict=True)
        )
        return (self.x.shape[0], *sides, self.weight.shape[0])

    def contiguous(self) -> Self:
        return self._replace(x=self.x.contiguous(), weight=self.weight.contiguous())

    @property
    def case(self) -> str:
        """Returns a name made of all that the time on a GPU depends on."""
        shapes = " by ".join("x".join(map(str, tensor.shape)) for tensor in (self.x, self.weight))
        return f"conv_e4m3 {shapes}, stride {self.stride}, {str(self.bias.dtype)[6:]} on {self.x.device}"


def _case(op: str, x: Tensor, weight: Tensor, around: dict[str, bool], dtype: torch.dtype) -> str:
    behind = "".join(f", {word}" for word, there in around.items() if there)
    rows, (out_features, in_features) = x.numel() // x.shape[-1], weight.shape
    return f"{op} {rows}x{in_features} by {out_features}{behind}, {str(dtype)[6:]} on {x.device}"


class FrameTables(NamedTuple):
    """The rule: a (F,), g (F,), b (F, F) float32, None for ones and zeros; `decay` beyond a token distance, -1 for none."""

    a: Tensor | None = None
    g: Tensor | None = None
    b: Tensor | None = None
    decay: float = 1.0
    beyond: int = -1

    @property
    def additive(self) -> bool:
        """Returns whether the rule only adds a constant to each pair of frames."""
        return self.a is None and self.g is None and (self.beyond < 0 or self.decay == 1.0)


class FrameProblem(NamedTuple):
    """What `vstar::frame_attention` takes: q, k, v (B, N, heads, head_dim), the fields of `FrameTables`, tokens a frame."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor | None
    g: Tensor | None
    b: Tensor | None
    decay: float
    beyond: int
    tokens: int

    @property
    def tables(self) -> FrameTables:
        return FrameTables(self.a, self.g, self.b, self.decay, self.beyond)

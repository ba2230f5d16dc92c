"""Temporal attention as a quickly deployable TensorRT plugin: its PTX lies in the engine, which then needs nothing else.

Python defines the plugin while an engine is built. TensorRT asks for output types and shapes, for the tactics it may time,
and for each tactic's PTX with a launch written as expressions over the tensors' dimensions, so that one engine serves any
number of frames and rows. TensorRT for RTX refuses such plugins: see `tensorrt_python_plugin`.
"""

from collections.abc import Callable
from importlib import import_module
from types import GenericAlias
from typing import Any

from .names import NAME, NAMESPACE
from .tactics import SHARED_WITHOUT_ASKING, Compiled, Tactic, compile_tactic, tactics

# our names and TensorRT's in the strings that describe combinations of types
DTYPES = {"fp16": "FP16", "bf16": "BF16", "fp32": "FP32"}
# how TensorRT's DataType calls them
TYPES = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}


def kernels(head_dim: int, dtype: str, arch: int) -> dict[int, tuple[Tactic, Compiled]]:
    """Compiles the tactics that TensorRT may time for a layer, by their numbers.

    Those that want more shared memory than a launch has without asking are left out: TensorRT's launch does not ask.
    """
    compiled = {n: (t, compile_tactic(t, head_dim, dtype, arch)) for n, t in enumerate(tactics(head_dim, dtype, arch), 1)}
    return {n: (t, kernel) for n, (t, kernel) in compiled.items() if kernel.shared <= SHARED_WITHOUT_ASKING}


def _annotated(function: Callable[..., Any], result: Any, described: type, **rest: Any) -> Callable[..., Any]:
    """Annotates a callback as TensorRT's decorators demand, with classes that exist once TensorRT is imported."""
    function.__annotations__ = {**dict.fromkeys("qkvg", described), **rest, "return": result}
    return function


def register(trt: Any, arch: int) -> None:
    """Defines the plugin in this process, for engines that run on `arch` (or on newer ones, where it is 80)."""
    plugin: Any = import_module(f"{trt.__name__}.plugin")
    described, identity = plugin.TensorDesc, f"{NAMESPACE}::{NAME}"

    def output(q, k, v, g):  # type: ignore[no-untyped-def]
        return q.like()

    def choices(q, k, v, g, outputs):  # type: ignore[no-untyped-def]
        dtype = TYPES[q.dtype.name]
        kind = DTYPES[dtype]
        numbers = list(kernels(q.shape[4], dtype, arch))
        return [plugin.AutoTuneCombination(f"{kind}, {kind}, {kind}, FP32, {kind}", "LINEAR", numbers)]

    def code(q, k, v, g, outputs, tactic):  # type: ignore[no-untyped-def]
        chosen, kernel = kernels(q.shape[4], TYPES[q.dtype.name], arch)[tactic]
        batch, frames, positions, heads, _ = q.shape_expr

        def less(a: int, b: Any) -> Any:
            return plugin.ShapeExpr(a) < b

        programs = chosen.programs(batch, frames, positions, heads, plugin.cdiv, less)
        launch = plugin.KernelLaunchParams(grid_x=programs, block_x=kernel.threads, shared_mem=kernel.shared)
        # a g for all rows of the batch is read again for each: its step is 0
        g_step = less(1, g.shape_expr[0]) * frames
        integers = plugin.SymIntExprs(5)
        for index, value in enumerate((frames, positions, heads, chosen.run, g_step)):
            integers[index] = plugin.SymInt32(value)
        return kernel.entry_point, kernel.ptx, launch, integers

    tensors, combinations = GenericAlias(tuple, described), GenericAlias(list, plugin.AutoTuneCombination)
    compiled = GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs))
    plugin.register(identity)(_annotated(output, described, described))
    plugin.autotune(identity)(_annotated(choices, combinations, described, outputs=tensors))
    plugin.aot_impl(identity)(_annotated(code, compiled, described, outputs=tensors, tactic=int))

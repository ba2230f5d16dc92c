"""The three networks as ONNX files: traced without data, weights streamed beside the graph one tensor at a time.

The UNet's file has one `vstar::VstarTemporalAttention` node for each temporal attention (34 for VideoCrafter2), so that ONNX
Runtime runs it as it is and TensorRT maps the nodes to a plugin. Inputs carry every axis in full:

    latents (batch, 4, frames, height, width)   timestep (batch, frames) int64   context (batch, frames, 77, C)
    fps (batch,) int64   tar (batch, levels, frames) float32   ->   eps like latents
"""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx_ir.passes import common as passes
from onnxscript.rewriter.rules.common import (
    materialize_reshape_shape_rule,
    no_op_transpose_rule,
    squeeze_reshape_1d_rule,
    unsqueeze_unsqueeze_rule,
)
from torch import Tensor, nn

from vstar_engine.errors import ExportError
from vstar_engine.weights import checkpoint

from . import onnx_function
from .build_settings import OPSET, Estimate, Settings
from .builders import PATIENCE, Report, alive, silent
from .traced_networks import Network, decoder, text, unet

DTYPES = (torch.float32, torch.float16)
OPSETS = (18, 21, 23)
# on two cores mini took 39 s for 1014 modules, VideoCrafter2 76 s and 0.95 GiB for 1866 modules and 3.6 GB
MODULE_SECONDS = 0.035
DISK_BYTES_PER_SECOND = 400e6
TRACE_BYTES = 2**30
# those of onnxscript's rules that apply to these networks; one of its default ones takes a time with the square of the nodes
RULES = (squeeze_reshape_1d_rule, materialize_reshape_shape_rule, unsqueeze_unsqueeze_rule, no_op_transpose_rule)
# what a graph for inference must not hold: training's, sequences and control flow that TensorRT does not build
REFUSED = {
    "Dropout",
    "BatchNormalization",
    "SplitToSequence",
    "SequenceAt",
    "If",
    "Loop",
    "Scan",
    "RandomNormalLike",
    "Bernoulli",
}


def options(settings: Settings) -> dict[str, Any]:
    """Returns what else shapes an engine for ONNX Runtime."""
    check_format(settings.dtype, settings.opset)
    return {"opset": settings.opset, "inline": settings.inline}


def estimate(settings: Settings) -> Estimate:
    """Guesses what a build takes."""
    spec, dtype = settings.spec, settings.dtype
    return estimate_of(unet(spec.unet, dtype), decoder(spec.vae, dtype), text(spec.text, dtype))


def estimate_of(*networks: Network) -> Estimate:
    """Guesses what files of some networks take: a trace that knows no data, then the weights once."""
    size = sum(p.nbytes for network in networks for p in network.module.parameters())
    modules = sum(len(list(network.module.modules())) for network in networks)
    basis = "mini, 39 s, and videocrafter2, 76 s and 0.95 GiB, on two cores"
    return Estimate(MODULE_SECONDS * modules + size / DISK_BYTES_PER_SECOND, size, TRACE_BYTES, basis)


def build(settings: Settings, weights: Mapping[str, Tensor], folder: Path, report: Report) -> dict[str, Any]:
    """Writes the three networks into `folder`; returns their facts."""
    spec, dtype = settings.spec, settings.dtype
    networks = {
        "unet": unet(spec.unet, dtype, settings.cells),
        "decoder": decoder(spec.vae, dtype),
        "text": text(spec.text, dtype),
    }
    found = {}
    for name, network in networks.items():
        found[name] = write(network, weights, folder / f"{name}.onnx", settings.opset, report, settings.inline)
    return {**found, "versions": {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__}}


def check_format(dtype: torch.dtype, opset: int) -> None:
    """Raises ValueError for a dtype or opset that no file is written in."""
    if dtype not in DTYPES:
        raise ValueError(f"an ONNX file is written in float32 or float16, got {str(dtype)[6:]}")
    if opset not in OPSETS:
        raise ValueError(f"the opset must be one of {', '.join(map(str, OPSETS))}, got {opset}")
    if opset >= 23 and dtype == torch.float32:
        raise ValueError(f"opset {opset} in float32 holds Attention operators that TensorRT cannot build; take 21, or float16")


def write(
    network: Network,
    weights: Mapping[str, Tensor],
    path: Path,
    opset: int = OPSET,
    report: Report = silent,
    inline: bool = False,
) -> dict[str, Any]:
    """Writes a network and, beside it in `<path>.data`, its weights; returns the manifest's facts.

    `report` is called with the progress of a long write. `inline` replaces each temporal attention by standard operators.
    Raises ValueError for an unsupported dtype or opset, CheckpointError for weights that do not fit, ExportError for a graph
    that fails its checks.
    """
    dtype = next(network.module.parameters()).dtype
    check_format(dtype, opset)
    checkpoint.check(network.module, weights, network.prefix)
    with alive(report, f"tracing what {path.name} will hold"):
        model = traced(network, opset)
    if network.attentions:
        function = onnx_function.body(opset)
        model.functions[function.identifier()] = function
        model.opset_imports[onnx_function.DOMAIN] = 1
    onnx_function.count_nodes(model, network.attentions)
    if inline:
        onnx_function.inline(model)
    check_graph(model, network.module, opset)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = _streamed(name, value, weights, network.prefix, dtype)
    ir.save(model, path, external_data=f"{path.name}.data", callback=_progress(path, report))
    return facts(network, model)


def _progress(path: Path, report: Report) -> Callable[[ir.TensorProtocol, Any], None]:
    """Returns what is called for each tensor, and reports every few seconds."""
    said = time.monotonic()

    def callback(tensor: ir.TensorProtocol, place: Any) -> None:
        nonlocal said
        if time.monotonic() - said > PATIENCE:
            said = time.monotonic()
            report(f"{path.name}: {100 * place.index // place.total} % written")

    return callback


def traced(network: Network, opset: int) -> ir.Model:
    """Traces and simplifies a network; initializers that stand for its weights hold no value yet."""
    with _quiet():
        program = torch.export.export(network.module, (), network.inputs, dynamic_shapes=network.dims, strict=False)
        made = torch.onnx.export(
            program,
            (),
            kwargs=network.inputs,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=onnx_function.translations(),
            optimize=False,
            verbose=False,
        )
    assert made is not None
    model = made.model
    _simplify(model, [name for name, _ in network.module.named_parameters()])
    passes.ClearMetadataAndDocStringPass()(model)  # the tracer's stacks, which name this machine's folders
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # in torch's symbols, which would clash with the names given here
    for value in model.graph.inputs:
        assert value.name is not None
        value.shape = ir.Shape(network.shapes()[value.name])
    (result,) = model.graph.outputs
    result.name, result.shape = network.output, ir.Shape(network.axes)
    return model


def _simplify(model: ir.Model, parameters: list[str]) -> None:
    """Folds constants, merges and drops nodes. Weights, whose data are not there, are inputs until it is done."""
    weights = [model.graph.initializers.pop(name) for name in parameters if name in model.graph.initializers]
    for value in weights:
        value.const_value = None
    model.graph.inputs.extend(weights)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        onnxscript.rewriter.rewrite(model, RULES)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)
    for value in weights:
        model.graph.inputs.remove(value)
        assert value.name is not None
        model.graph.initializers[value.name] = value


def _streamed(name: str, value: ir.Value, weights: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> ir.LazyTensor:
    assert value.shape is not None
    assert value.dtype is not None
    shape = value.shape.numpy()

    def read() -> ir.TensorProtocol:
        return ir.tensor(checkpoint.parameter(weights, prefix, name, shape, dtype).numpy())

    return ir.LazyTensor(read, value.dtype, value.shape, name=name)


def check_graph(model: ir.Model, module: nn.Module, opset: int) -> None:
    """Raises ExportError unless the graph has the opset, all weights, named axes, and nothing that inference must not have."""
    if model.opset_imports[""] != opset:
        raise ExportError(f"the graph has opset {model.opset_imports['']} where {opset} was asked for")
    strange = sorted({node.op_type for node in model.graph.all_nodes()} & REFUSED)
    if strange:
        raise ExportError(f"the graph holds {', '.join(strange)}, which an engine for inference must not")
    held = model.graph.initializers
    unused = [name for name, _ in module.named_parameters() if name not in held or not held[name].uses()]
    if unused:
        raise ExportError(f"the graph does not use {checkpoint.listing(unused)} of the network's parameters")


def facts(network: Network, model: ir.Model) -> dict[str, Any]:
    """Describes a graph: inputs and outputs with types and axes, opset, operators, bytes of its weights."""
    counted = Counter(node.op_type for node in model.graph)
    held = [value.const_value for value in model.graph.initializers.values()]
    return {
        **network.described(),
        "opset": model.opset_imports[""],
        "nodes": sum(counted.values()),
        "temporal_attentions": counted[onnx_function.NAME],
        "weight_bytes": sum(tensor.nbytes for tensor in held if tensor is not None),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notices of missing optional libraries and its own deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)

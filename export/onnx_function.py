"""The temporal attention in ONNX: one node `vstar::VstarTemporalAttention`, and its body in standard operators.

Runtimes that know the node run a fused kernel; all others run the body. TensorRT's parser takes its plugin only for a node with
a `plugin_namespace`. It looks names up without their domain, so the name must differ from those of its own operators.
"""

from collections.abc import Callable, Iterator
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
)
from onnxscript.values import Opset

from vstar_engine.errors import ExportError

DOMAIN, NAME = "vstar", "VstarTemporalAttention"
ATTRIBUTES = {"plugin_namespace": "vstar", "plugin_version": "1", "aot": 1}

# names are unusual, since old parsers confuse a body's names with those around the call
BODY = """
<opset_import: ["" : {opset}], domain: "{domain}">
{name} <plugin_namespace: string = "vstar", plugin_version: string = "1", aot: int = 1> (_q, _k, _v, _g) => (_out)
{{
   _zero = Constant <value_int: int = 0> ()
   _one = Constant <value_int: int = 1> ()
   _first = Constant <value_ints: ints = [0]> ()
   _second = Constant <value_ints: ints = [1]> ()
   _heads = Constant <value_ints: ints = [1, 2]> ()
   _last = Constant <value_ints: ints = [-1]> ()
   _q32 = Cast <to: int = 1> (_q)
   _k32 = Cast <to: int = 1> (_k)
   _v32 = Cast <to: int = 1> (_v)
   _rows = Transpose <perm: ints = [0, 2, 3, 1, 4]> (_q32)
   _columns = Transpose <perm: ints = [0, 2, 3, 4, 1]> (_k32)
   _values = Transpose <perm: ints = [0, 2, 3, 1, 4]> (_v32)
   _products = MatMul (_rows, _columns)
   _width = Shape <start: int = 4, end: int = 5> (_q)
   _width32 = Cast <to: int = 1> (_width)
   _root = Sqrt (_width32)
   _phi = Div (_products, _root)
   _max = ReduceMax <keepdims: int = 1> (_phi, _last)
   _length = Shape <start: int = 1, end: int = 2> (_q)
   _frames = Squeeze (_length)
   _others = Shape <start: int = 1, end: int = 2> (_k)
   _keys = Squeeze (_others)
   _index = Range (_zero, _frames, _one)
   _places = Range (_zero, _keys, _one)
   _i = Unsqueeze (_index, _second)
   _j = Unsqueeze (_places, _first)
   _difference = Sub (_i, _j)
   _distance = Abs (_difference)
   _toeplitz = Gather <axis: int = 1> (_g, _distance)
   _bias = Unsqueeze (_toeplitz, _heads)
   _weighted = Mul (_max, _bias)
   _logits = Add (_phi, _weighted)
   _probs = Softmax <axis: int = -1> (_logits)
   _mixed = MatMul (_probs, _values)
   _back = Transpose <perm: ints = [0, 3, 1, 2, 4]> (_mixed)
   _out = CastLike (_back, _q)
}}
"""


def body(opset: int) -> ir.Function:
    """Returns the model-local function. Its opset must be the model's: checkers and inliners skip it otherwise."""
    function: Any = ir.from_proto(onnx.parser.parse_function(BODY.format(opset=opset, domain=DOMAIN, name=NAME)))
    return function


def translations() -> dict[Any, Callable[..., Any]]:
    """Returns the table by which `torch.onnx.export` makes one node of the op; registers the node's schema with onnx."""
    if not onnx.defs.has(NAME, DOMAIN):
        types = ("T", ["tensor(float)", "tensor(float16)"], "the network's dtype")
        onnx.defs.register_schema(
            OpSchema(
                NAME,
                DOMAIN,
                1,
                inputs=[OpSchema.FormalParameter(name, "T") for name in "qkv"]
                + [OpSchema.FormalParameter("g", "tensor(float)")],
                outputs=[OpSchema.FormalParameter("out", "T")],
                type_constraints=[types],
                attributes=[
                    OpSchema.Attribute("plugin_namespace", OpSchema.AttrType.STRING, required=False),
                    OpSchema.Attribute("plugin_version", OpSchema.AttrType.STRING, required=False),
                    OpSchema.Attribute("aot", OpSchema.AttrType.INT, required=False),
                ],
            )
        )
    node = getattr(Opset(DOMAIN, 1), NAME)
    return {torch.ops.vstar.temporal_attention.default: lambda q, k, v, g: node(q, k, v, g, **ATTRIBUTES)}


def inline(model: ir.Model) -> None:
    """Replaces every call by the body's standard operators; ExportError where another domain than ONNX's own is left."""
    InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    CommonSubexpressionEliminationPass()(model)
    NameFixPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain not in ("", "ai.onnx")}
    )
    if foreign or model.functions:
        raise ExportError(f"the inlined graph still holds {', '.join(foreign) or 'functions'}")


def _nested(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yields the calls that lie in a subgraph."""
    yield from (node for node in graph.all_nodes() if node.op_type == NAME and node.graph is not graph)


def count_nodes(model: ir.Model, wanted: int) -> int:
    """Counts the calls; ExportError unless they are `wanted`, at graph level, with every attribute, and one body is there.

    A call inside a subgraph or another function is decomposed by TensorRT whatever its attributes say.
    """
    inside = [node for function in model.functions.values() for node in function if node.op_type == NAME]
    inside += _nested(model.graph)
    if inside:
        raise ExportError(f"{len(inside)} {NAME} nodes are nested in a function or subgraph, where no plugin would serve them")
    calls = [node for node in model.graph if node.op_type == NAME]
    if len(calls) != wanted:
        raise ExportError(f"the graph holds {len(calls)} {NAME} nodes where the network has {wanted} temporal attentions")
    for node in calls:
        found = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.domain != DOMAIN or found != ATTRIBUTES:
            raise ExportError(f"node {node.name} is {node.domain}::{NAME} with {found} where {ATTRIBUTES} must be carried")
    bodies = [function for function in model.functions.values() if function.name == NAME]
    if wanted and [f.opset_imports.get("") for f in bodies] != [model.opset_imports[""]]:
        raise ExportError(
            f"{NAME} needs one body of the model's opset {model.opset_imports['']}, found {len(bodies)} functions"
        )
    return len(calls)

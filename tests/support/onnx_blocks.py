"""Small ONNX files around the temporal-attention node, right and wrong in ways that a parser answers differently."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from vstar_engine.export.onnx_function import ATTRIBUTES, BODY, DOMAIN, NAME

OPSET = 21
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def block(path: Path, dtype: str = "float16", heads: int = 2, head_dim: int = 16, fault: str = "") -> Path:
    """Writes hidden (batch, frames, positions, 3, heads, head_dim), g (batch, frames) -> two attentions -> hidden."""
    kind = TYPES[dtype]
    carried = dict(ATTRIBUTES)
    if fault == "no namespace":
        del carried["plugin_namespace"]
    if fault == "version":
        carried["plugin_version"] = "2"
    axes = ["batch", "frames", "positions"]
    nodes = [helper.make_node("Split", ["hidden"], ["q", "k", "v"], axis=3, num_outputs=3)]
    shape = helper.make_tensor("axis", TensorProto.INT64, [1], [3])
    for name in "qkv":
        nodes.append(helper.make_node("Squeeze", [name, "axis"], [f"{name}5"]))
    nodes.append(helper.make_node(NAME, ["q5", "k5", "v5", "g"], ["first"], name="first", domain=DOMAIN, **carried))
    called = "Wrapped" if fault == "nested" else NAME
    given = {} if fault == "nested" else carried
    nodes.append(helper.make_node(called, ["first", "k5", "v5", "g"], ["out"], name="second", domain=DOMAIN, **given))
    graph = helper.make_graph(
        nodes,
        "block",
        [
            helper.make_tensor_value_info("hidden", kind, [*axes, 3, heads, head_dim]),
            helper.make_tensor_value_info("g", TensorProto.FLOAT, axes[:2]),
        ],
        [helper.make_tensor_value_info("out", kind, [*axes, heads, head_dim])],
        [shape],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [onnx.parser.parse_function(BODY.format(opset=OPSET, domain=DOMAIN, name=NAME))]
    if fault == "nested":
        inner = helper.make_node(NAME, list("qkvg"), ["out"], domain=DOMAIN, **carried)
        functions.append(helper.make_function(DOMAIN, "Wrapped", list("qkvg"), ["out"], [inner], opsets))
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    onnx.checker.check_model(model, full_check=fault != "nested")
    onnx.save(model, path)
    return path

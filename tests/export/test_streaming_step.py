"""The step of a streaming model as one graph: ONNX Runtime and AOTInductor compute what eager does."""

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from support.streaming import SPEC
from vstar_engine.export import onnx_function, to_inductor, to_onnx
from vstar_engine.export.builders import silent
from vstar_engine.export.traced_networks import StreamingStep, streaming_step
from vstar_engine.kernels.temporal_attention import temporal_attention_ref
from vstar_engine.weights import checkpoint, key_map, random_checkpoint
from vstar_engine.weights.streaming_keys import OfficialNames, published_shapes

SAME = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def weights():
    tensors = {name: random_checkpoint.tensor(name, shape, 3) for name, shape in published_shapes(SPEC).items()}
    return OfficialNames(tensors, SPEC)


@pytest.fixture(scope="module")
def step(weights):
    module = StreamingStep(SPEC)
    checkpoint.load(module, weights, key_map.UNET)
    return module.eval().requires_grad_(False)


def inputs(batch, height, width):
    generator = torch.Generator().manual_seed(batch)
    return {
        "latents": torch.randn(batch, 4, 16, height, width, generator=generator),
        "timestep": torch.randint(0, 1000, (batch, 16), generator=generator),
        "context": torch.randn(batch, 16, 81, 32, generator=generator),
        "tar": torch.randn(batch, 2, 16, generator=generator) / 4,
        "features": torch.randn(batch, 8, 32, height, width, generator=generator),
    }


@pytest.mark.parametrize(("frames", "keys"), [(16, 8), (6, 6), (5, 1)], ids=str)
def test_the_nodes_body_takes_fewer_keys_than_frames(frames, keys):
    """As a fuser has: the chunk's frames are queries, the known ones keys."""
    shapes = {"q": frames, "k": keys, "v": keys}
    given = {name: torch.randn(2, count, 3, 2, 16) for name, count in shapes.items()} | {"g": torch.randn(2, frames)}
    node = helper.make_node(onnx_function.NAME, list(given), ["out"], domain=onnx_function.DOMAIN, **onnx_function.ATTRIBUTES)
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape)) for name, value in given.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, frames, 3, 2, 16])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(onnx_function.DOMAIN, 1)]
    functions = [ir.to_proto(onnx_function.body(21))]
    graph = helper.make_graph([node], "attention", told, [out])
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run(["out"], {name: value.numpy() for name, value in given.items()})
    assert torch.allclose(torch.from_numpy(made), temporal_attention_ref(*given.values()), **SAME)


@pytest.mark.slow
def test_onnx_computes_what_eager_does(step, weights, tmp_path):
    network = streaming_step(SPEC, torch.float32)
    facts = to_onnx.write(network, weights, tmp_path / "step.onnx")
    assert facts["temporal_attentions"] == network.attentions
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    for given in (inputs(1, 4, 6), inputs(3, 2, 8)):
        (eps,) = session.run(["eps"], {name: value.numpy() for name, value in given.items()})
        assert torch.allclose(torch.from_numpy(eps), step(**given), **SAME)


@pytest.mark.slow
def test_a_package_computes_what_eager_does(step, weights, tmp_path):
    program = to_inductor.trace_streaming(SPEC, weights, torch.device("cpu"), torch.float32)
    to_inductor.compile_package(program, tmp_path / "step.pt2", silent)
    run = torch._inductor.aoti_load_package(str(tmp_path / "step.pt2"))
    for given in (inputs(1, 4, 6), inputs(3, 2, 8)):
        assert torch.allclose(run(**given), step(**given), **SAME)

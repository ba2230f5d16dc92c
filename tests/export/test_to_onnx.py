"""ONNX files: one node for each temporal attention, free axes, refusals, and ONNX Runtime as accurate as eager."""

import dataclasses
import math
import resource
from functools import cached_property
from pathlib import Path

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from support.accuracy import assert_as_accurate
from vstar_engine.artifacts.files import write_aside
from vstar_engine.bench.step.openvino_step import OpenVinoUnet
from vstar_engine.config.models import Spec, TextSpec, VaeSpec
from vstar_engine.errors import CheckpointError, ExportError, OutputError
from vstar_engine.export import onnx_function, to_onnx, traced_networks
from vstar_engine.kernels.temporal_attention import temporal_attention_ref
from vstar_engine.networks.unet import UNet
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.weights import checkpoint, official_config
from vstar_engine.weights.key_map import UNET, official_shapes

CELLS = (4, 8)
# dtype, opset, size: free axes everywhere in float32, a fixed size in float16
FILES = {
    "float32": (torch.float32, 21, None),
    "float16, one level": (torch.float16, 21, CELLS),
    "float16": (torch.float16, 21, CELLS),
    "float32-18": (torch.float32, 18, CELLS),
    "float16-23": (torch.float16, 23, CELLS),
}
SLOW = ("float16", "float32-18", "float16-23")


@dataclasses.dataclass(frozen=True)
class Exported:
    """An ONNX file of a tiny UNet, its facts, the same network in eager, and how many temporal attentions it has."""

    path: object
    facts: dict
    eager: UNet
    exact: UNet
    dtype: torch.dtype
    attentions: int

    @cached_property
    def session(self):
        return onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def run(self, given):
        (eps,) = self.session.run(["eps"], {name: value.numpy() for name, value in given.items()})
        return torch.from_numpy(eps)


@pytest.fixture(scope="module")
def tiny(golden):
    case = golden.case("unet_plain_shared")
    return official_config.spec_from_official(golden.config(case, "unet_params")), golden.weights(case)


def one_level(spec):
    return dataclasses.replace(spec, channel_mult=spec.channel_mult[:1], attention_levels=(0,))


def drawn(spec):
    """Draws weights by official names, each as large as keeps what it multiplies about as large."""
    whole = Spec("small", spec, VaeSpec(), TextSpec(width=spec.context_dim), size=(64, 64))
    shapes = {name[len(UNET) :]: shape for name, shape in official_shapes(whole).items() if name.startswith(UNET)}
    return {name: torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}


def loaded(spec, weights, dtype):
    unet = UNet(spec)
    checkpoint.load(unet, weights, dtype=dtype)
    return unet.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FILES])
def exported(request, tiny, tmp_path_factory):
    (spec, weights), (dtype, opset, size) = tiny, FILES[request.param]
    # two of each temporal transformer: two stages down, the middle, four up, and the stem
    attentions = 16
    if request.param.endswith("one level"):
        spec, attentions = one_level(spec), 10
        weights = drawn(spec)
    path = tmp_path_factory.mktemp("onnx") / "unet.onnx"
    facts = to_onnx.write(dataclasses.replace(traced_networks.unet(spec, dtype, size), prefix=""), weights, path, opset)
    return Exported(path, facts, loaded(spec, weights, dtype), loaded(spec, weights, torch.float64), dtype, attentions)


def inputs(spec, dtype, batch, frames, height=4, width=8, tar=True):
    """Every item of the batch has its own timesteps, context, frame rate and rows of tar."""
    generator = torch.Generator().manual_seed(batch + 10 * frames)
    rows = torch.randn(batch, spec.levels, frames, generator=generator)
    return {
        "latents": torch.randn(batch, 4, frames, height, width, generator=generator).to(dtype),
        "timestep": torch.randint(0, 1000, (batch, frames), generator=generator),
        "context": torch.randn(batch, frames, 77, spec.context_dim, generator=generator).to(dtype),
        "fps": torch.randint(8, 30, (batch,), generator=generator),
        "tar": rows if tar else torch.zeros_like(rows),
    }


@pytest.mark.parametrize("tar", [True, False], ids=["tar", "plain"])
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 8), (2, 2), (2, 5), (2, 17)], ids=str)
def test_onnx_runtime_is_as_accurate_as_eager(exported, batch, frames, tar):
    given = inputs(exported.eager.spec, exported.dtype, batch, frames, tar=tar)
    wide = {name: value.double() if value.dtype == exported.dtype and name != "tar" else value for name, value in given.items()}
    with torch.inference_mode():
        eager, exact = exported.eager(**given), exported.exact(**wide)
    assert_as_accurate(exported.run(given), eager, exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet_full_topology_64D1_32D8", "unet_two_channels_per_group"])
def test_golden_networks_of_other_layers_are_as_accurate(golden, name, tmp_path):
    """VideoCrafter2's levels and blocks, narrower (`unet_full_topology_plain` is the same network); groups of two channels."""
    case = golden.case(name)
    spec, weights = official_config.spec_from_official(golden.config(case, "unet_params")), golden.weights(case)
    described = dataclasses.replace(traced_networks.unet(spec, torch.float32), prefix="")
    facts = to_onnx.write(described, weights, tmp_path / "unet.onnx")
    assert facts["temporal_attentions"] == described.attentions
    eager, exact = (loaded(spec, weights, dtype) for dtype in (torch.float32, torch.float64))
    made = Exported(tmp_path / "unet.onnx", facts, eager, exact, torch.float32, described.attentions)
    unit = 2 ** (spec.levels - 1)
    for batch, frames, tar in ((1, 1, True), (2, 5, True), (1, 17, False)):
        given = inputs(spec, torch.float32, batch, frames, unit, 2 * unit, tar)
        wide = {name: value.double() if name in ("latents", "context") else value for name, value in given.items()}
        with torch.inference_mode():
            assert_as_accurate(made.run(given), eager(**given), exact(**wide))


def test_tar_reaches_every_item_of_the_batch(exported):
    given = inputs(exported.eager.spec, exported.dtype, 2, 5)
    changed = exported.run({**given, "tar": torch.stack([given["tar"][0], 0 * given["tar"][1]])})
    out = exported.run(given)
    assert torch.equal(out[0], changed[0])
    assert (out[1] - changed[1]).norm() > 0.01 * out[1].norm()


@pytest.mark.parametrize("size", [(2, 2), (6, 12)], ids=str)
def test_height_and_width_are_free_where_no_size_was_given(exported, size):
    given = inputs(exported.eager.spec, exported.dtype, 2, 3, *size)
    if exported.facts["inputs"][0]["shape"][-2:] == ["height", "width"]:
        assert exported.run(given).shape == given["latents"].shape
    else:
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="latents"):
            exported.run(given)


def test_the_file_is_valid_and_says_what_it_is(exported):
    onnx.checker.check_model(str(exported.path), full_check=True)
    model = onnx.load(exported.path, load_external_data=False)
    calls = [node for node in model.graph.node if node.op_type == onnx_function.NAME]
    assert len(calls) == exported.facts["temporal_attentions"] == exported.attentions
    assert {node.domain for node in calls} == {"vstar"}
    assert {attribute.name for attribute in calls[0].attribute} == {"plugin_namespace", "plugin_version", "aot"}
    assert [x.name for x in model.graph.input] == ["latents", "timestep", "context", "fps", "tar"]
    assert exported.facts["inputs"][1] == {"name": "timestep", "dtype": "int64", "shape": ["batch", "frames"]}
    assert exported.facts["outputs"][0]["shape"] == exported.facts["inputs"][0]["shape"]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": exported.facts["opset"], "vstar": 1}
    assert str(Path(to_onnx.__file__).parents[1]).encode() not in exported.path.read_bytes(), "the tracer's stacks are left out"
    # the weights lie beside the graph
    assert exported.path.stat().st_size < exported.path.with_name("unet.onnx.data").stat().st_size
    held = sum(parameter.nbytes for parameter in exported.eager.parameters())
    assert held <= exported.facts["weight_bytes"] < held + 2**16


@pytest.fixture(scope="module")
def inlined(tiny, tmp_path_factory):
    spec = one_level(tiny[0])
    weights = drawn(spec)
    path = tmp_path_factory.mktemp("inlined") / "unet.onnx"
    network = dataclasses.replace(traced_networks.unet(spec, torch.float32), prefix="")
    facts = to_onnx.write(network, weights, path, inline=True)
    return Exported(path, facts, loaded(spec, weights, torch.float32), loaded(spec, weights, torch.float64), torch.float32, 10)


def test_an_inlined_file_holds_standard_operators_alone(inlined):
    onnx.checker.check_model(str(inlined.path), full_check=True)
    model = onnx.load(inlined.path, load_external_data=False)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert not model.functions
    assert inlined.facts["temporal_attentions"] == 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_inlined_file_computes_the_same(inlined, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    run = inlined.run if runtime == "onnxruntime" else lambda given: OpenVinoUnet(inlined.path, torch.float32)(**given)
    for batch, frames in ((1, 1), (2, 5)):
        given = inputs(inlined.eager.spec, torch.float32, batch, frames)
        wide = {name: value.double() if name in ("latents", "context") else value for name, value in given.items()}
        with torch.inference_mode():
            assert_as_accurate(run(given), inlined.eager(**given), inlined.exact(**wide))


def test_an_operator_of_another_domain_that_is_left_is_refused():
    model = small()
    model.graph[0].domain = "other"
    with pytest.raises(ExportError, match="still holds other::VstarTemporalAttention"):
        onnx_function.inline(model)


@pytest.mark.parametrize("frames", [1, 2, 7, 40])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_body_computes_the_attention(frames, rows):
    shape = (2, frames, 3, 2, 16)
    q, k, v = (3 * torch.randn(shape) for _ in range(3))
    g = torch.randn(rows, frames)
    exact = temporal_attention_ref(q.double(), k.double(), v.double(), g.double())
    session = onnxruntime.InferenceSession(ir.to_proto(small()).SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "g": g.numpy()})
    assert_as_accurate(torch.from_numpy(out), temporal_attention_ref(q, k, v, g), exact)


def small(opset=21, body=21, call='plugin_namespace="vstar", plugin_version="1", aot=1'):
    """A graph with one call."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "vstar" : 1]>
    one (float[b, t, p, h, d] q, float[b, t, p, h, d] k, float[b, t, p, h, d] v, float[r, t] g) => (float[b, t, p, h, d] out)
    {{ out = vstar.VstarTemporalAttention <{call}> (q, k, v, g) }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    if body:
        function = onnx_function.body(body)
        model.functions[function.identifier()] = function
    return model


def test_a_graph_as_it_should_be_passes():
    assert onnx_function.count_nodes(small(), 1) == 1


@pytest.mark.parametrize(
    ("model", "wanted", "complaint"),
    [
        (lambda: small(), 2, "holds 1 VstarTemporalAttention nodes where the network has 2"),
        (lambda: small(body=18), 1, "one body of the model's opset 21"),
        (lambda: small(body=None), 1, "found 0 functions"),
        (lambda: small(call='plugin_version="1", aot=1'), 1, "must be carried"),
        (lambda: small(call='plugin_namespace="vstar", plugin_version="2", aot=1'), 1, "must be carried"),
        (lambda: nested(), 1, "nested"),
    ],
    ids=["count", "opset of the body", "no body", "no namespace", "version", "nested"],
)
def test_a_graph_that_tensorrt_would_misread_is_refused(model, wanted, complaint):
    with pytest.raises(ExportError, match=complaint):
        onnx_function.count_nodes(model(), wanted)


def nested():
    """A graph whose call lies in another local function."""
    model = small()
    function = ir.from_proto(
        onnx.parser.parse_function("""<opset_import: ["" : 21, "vstar" : 1], domain: "other">
        Around (q, k, v, g) => (out) { out = vstar.VstarTemporalAttention (q, k, v, g) }""")
    )
    model.functions[function.identifier()] = function
    return model


@pytest.mark.parametrize(
    ("dtype", "opset", "complaint"),
    [
        (torch.bfloat16, 21, "float32 or float16, got bfloat16"),
        (torch.float32, 17, "opset must be one of 18, 21, 23, got 17"),
        (torch.float32, 23, "TensorRT cannot build"),
    ],
    ids=str,
)
def test_formats_that_are_refused(dtype, opset, complaint):
    with pytest.raises(ValueError, match=complaint):
        to_onnx.check_format(dtype, opset)


def test_training_leftovers_are_refused():
    model = small()
    model.graph.append(ir.node("Dropout", [model.graph.inputs[0]]))
    with pytest.raises(ExportError, match="Dropout"):
        to_onnx.check_graph(model, torch.nn.Identity(), 21)
    with pytest.raises(ExportError, match="opset 21 where 18"):
        to_onnx.check_graph(small(), torch.nn.Identity(), 18)
    with pytest.raises(ExportError, match="does not use weight, bias"):
        to_onnx.check_graph(small(), torch.nn.Linear(2, 2), 21)


def test_weights_of_another_network_are_refused_before_tracing(tiny, tmp_path, monkeypatch):
    spec, weights = tiny
    monkeypatch.setattr(to_onnx, "traced", None)
    described = dataclasses.replace(traced_networks.unet(spec, torch.float32), prefix="")
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        to_onnx.write(described, {name: w for name, w in weights.items() if name != "out.0.bias"}, tmp_path / "unet.onnx")
    assert not list(tmp_path.iterdir())


def test_decoder_and_text_tower_equal_eager(golden, tmp_path):
    case = golden.case("vae_tiny")
    spec = official_config.spec_from_official(golden.config(case, "ddconfig"))
    vae = traced_networks.FrameDecoder(spec)
    checkpoint.load(vae, golden.weights(case))
    described = dataclasses.replace(traced_networks.decoder(spec, torch.float32), prefix="")
    to_onnx.write(described, golden.weights(case), tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 4, 4, 6), (3, 4, 5, 4)):
        latents = torch.randn(shape)
        (pixels,) = session.run(["pixels"], {"latents": latents.numpy()})
        with torch.inference_mode():
            assert_as_accurate(torch.from_numpy(pixels), vae(latents), vae.double()(latents.double()))
        vae.float()


@pytest.fixture(scope="module")
def text_tower(mini):
    described = traced_networks.text(mini.spec.text, torch.float32)
    return described, to_onnx.traced(described, 21)


def test_text_tower_equals_eager(mini, mini_weights, text_tower, tmp_path, monkeypatch):
    (described, traced), said = text_tower, []
    monkeypatch.setattr(to_onnx, "traced", lambda *given: traced)
    monkeypatch.setattr(to_onnx, "PATIENCE", -1.0)
    facts = to_onnx.write(described, checkpoint.Weights(mini_weights), tmp_path / "text.onnx", report=said.append)
    assert said[0] == "tracing what text.onnx will hold"
    written = [line for line in said if line.endswith("% written")]
    assert written[0] == "text.onnx: 0 % written"
    assert len(written) > 10
    assert facts["outputs"] == [{"name": "context", "dtype": "float32", "shape": ["prompts", 77, mini.spec.text.width]}]
    tokens = tokenize(["deep snow", "", "flowers in bloom"])
    session = onnxruntime.InferenceSession(tmp_path / "text.onnx", providers=["CPUExecutionProvider"])
    (context,) = session.run(["context"], {"tokens": tokens.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(context), mini.embed(["deep snow", "", "flowers in bloom"]), rtol=1e-4, atol=1e-5
    )


def test_a_file_that_cannot_be_written_whole(text_tower, mini_weights, tmp_path, monkeypatch):
    described, traced = text_tower
    monkeypatch.setattr(to_onnx, "traced", lambda *given: traced)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"), write_aside(tmp_path / "e", folder=True) as aside:
            to_onnx.write(described, checkpoint.Weights(mini_weights), aside / "text.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_full_size_has_34_nodes():
    from vstar_engine.config.models import MODELS

    described = traced_networks.unet(MODELS["videocrafter2"].unet, torch.float16, (40, 64))
    assert described.attentions == 34
    model = to_onnx.traced(described, 21)
    assert sum(node.op_type == onnx_function.NAME for node in model.graph) == 34

"""A model repository for Triton Inference Server: its configurations, and its orchestrator run with a stand-in server."""

import functools
import importlib.util
import json
import re

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import pytest
import triton_python_backend_utils as server

from support import scratch
from support.engines import engine_at
from vstar_engine import Sampling, Tar
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.backends import tensorrt_plugins
from vstar_engine.commands.main import main
from vstar_engine.errors import EngineError, OutputError
from vstar_engine.export import to_triton_server
from vstar_engine.kernels.source_hash import kernel_hash

UNET = """name: "vstar_unet"
backend: "onnxruntime"
default_model_filename: "unet.onnx"
max_batch_size: 0
input [
  { name: "latents" data_type: TYPE_FP32 dims: [ -1, 4, -1, 4, 8 ] },
  { name: "timestep" data_type: TYPE_INT64 dims: [ -1, -1 ] },
  { name: "context" data_type: TYPE_FP32 dims: [ -1, -1, 77, 64 ] },
  { name: "fps" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "tar" data_type: TYPE_FP32 dims: [ -1, 3, -1 ] }
]
output [
  { name: "eps" data_type: TYPE_FP32 dims: [ -1, 4, -1, 4, 8 ] }
]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
SETTINGS = {"frames": 5, "seed": 4, "sampling": {"steps": 3}, "tar": {"sigma": {"0": 1.0, "1": 8.0}, "until_step": 1}}


@pytest.fixture(scope="module")
def repository(onnx_engine, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "models"
    assert main(["export", "triton-server", str(onnx_engine.folder), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def orchestrator(repository):
    server.REPOSITORY = repository
    spec = importlib.util.spec_from_file_location("orchestrator", repository / "vstar" / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(repository / "vstar"), "model_version": "1"})
    return model


def test_four_models_with_their_files(repository):
    found = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
    weights = [f"vstar_{part}/1/{part}.onnx{end}" for part in ("decoder", "text", "unet") for end in ("", ".data")]
    configurations = [f"{name}/config.pbtxt" for name in ("vstar", "vstar_decoder", "vstar_text", "vstar_unet")]
    assert found == sorted([*weights, *configurations, "vstar/1/engine.json", "vstar/1/model.py"])


def test_configurations(repository):
    assert (repository / "vstar_unet" / "config.pbtxt").read_text() == UNET
    decoder = (repository / "vstar_decoder" / "config.pbtxt").read_text()
    assert '{ name: "pixels" data_type: TYPE_FP32 dims: [ -1, 3, -1, -1 ] }' in decoder
    text = (repository / "vstar_text" / "config.pbtxt").read_text()
    assert '{ name: "tokens" data_type: TYPE_INT64 dims: [ -1, 77 ] }' in text
    assert "decoupled: true" in (repository / "vstar" / "config.pbtxt").read_text()


@functools.cache
def schema():
    """The published schema, in the wheel of tritonclient, of which one file is read, without what the others depend on."""
    path = scratch.installed("tritonclient", "tritonclient==2.73.0") / "tritonclient" / "grpc" / "model_config_pb2.py"
    made = importlib.util.module_from_spec(loaded := importlib.util.spec_from_file_location("model_config_pb2", path))
    loaded.loader.exec_module(made)
    return made


def test_configurations_follow_the_published_schema(repository):
    from google.protobuf import text_format

    read, published = {}, schema()
    for configuration in repository.glob("*/config.pbtxt"):
        model = text_format.Parse(configuration.read_text(), published.ModelConfig())
        assert model.name == configuration.parent.name
        assert all(tensor.data_type and tensor.dims for tensor in [*model.input, *model.output])
        read[model.name] = model
    assert sorted(read) == ["vstar", "vstar_decoder", "vstar_text", "vstar_unet"]
    assert [tensor.name for tensor in read["vstar_unet"].input] == ["latents", "timestep", "context", "fps", "tar"]
    assert list(read["vstar_unet"].output[0].dims) == [-1, 4, -1, 4, 8]
    assert read["vstar"].model_transaction_policy.decoupled
    with pytest.raises(text_format.ParseError, match="no field named"):
        text_format.Parse(UNET.replace("max_batch_size", "most_rows"), published.ModelConfig())


def test_it_streams_every_step_and_then_the_video_that_eager_makes(orchestrator, mini):
    client = server.Client(["snow", "flowers"], json.dumps(SETTINGS))
    orchestrator.execute([client])
    steps = [server.get_output_tensor_by_name(response, "STEP").values.tolist() for response in client.received]
    assert steps == [[1, 3], [2, 3], [3, 3], [3, 3]]
    assert client.finals == 1
    *early, video = [server.get_output_tensor_by_name(response, "VIDEO").values for response in client.received]
    assert all(part.size == 0 for part in early)
    sampling, tar = Sampling(steps=3), Tar({0: 1.0, 1: 8.0}, until_step=1)
    eager = mini.generate(["snow", "flowers"], frames=5, seed=4, size=(32, 64), sampling=sampling, tar=tar)
    assert video.shape == eager.frames.shape
    assert abs(video.astype(int) - eager.frames.astype(int)).max() <= 1


def test_a_client_that_goes_away_stops_the_work(orchestrator):
    client = server.Client(["snow"], json.dumps(SETTINGS), patience=1)
    orchestrator.execute([client])
    assert len(client.received) == client.finals == 1


@pytest.mark.parametrize(
    ("states", "settings", "complaint"),
    [
        ([], "{}", "no states"),
        (["snow"], '{"frames": 0}', "frames must be 1 to 10000"),
        (["snow"], '{"size": [32, 32]}', "is for 32x64, got 32x32"),
        (["snow"], '{"speed": 1}', "speed"),
        (["snow"], "{", "Expecting"),
        (["snow"], '{"tar": {}}', "tar needs sigma, an object such as .*, got null"),
        (["snow"], '{"tar": {"sigma": 5}}', "tar needs sigma, an object such as .*, got 5"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense_are_answered(orchestrator, states, settings, complaint):
    client = server.Client(states, settings)
    orchestrator.execute([client])
    (response,) = client.received
    assert re.search(complaint, response.error().message())
    assert client.finals == 1


def test_only_engines_that_triton_serves(tmp_path, mini_weights):
    artifact = BuiltEngine.open(engine_at(tmp_path / "e"))
    with pytest.raises(EngineError, match="backend inductor; Triton Inference Server takes onnxruntime"):
        to_triton_server.write(artifact, {}, tmp_path / "models", False, print)
    assert not (tmp_path / "models").exists()


PLUGIN = "VSTAR_TENSORRT_PLUGIN"


def plan_at(folder, versions=None, **options):
    """A folder that looks like a TensorRT engine of two profiles."""
    profiles = [{"frames": [1, 16, 16]}, {"frames": [17, 32, 32]}]
    facts = {"unet": {"inputs": [], "outputs": []}, "plan": {"profiles": profiles}}
    shaped = {"plugin": "aot", "refit": "no", **options}
    about = {"backend": "tensorrt", "device": "NVIDIA H200 sm_90", "frames": [16, 32], "versions": versions or {}}
    return BuiltEngine.open(engine_at(folder, file="unet.plan", facts=facts, options=shaped, **about))


@pytest.fixture
def parts(monkeypatch):
    """Stands in for writing the decoder and the text tower."""
    monkeypatch.setattr(to_triton_server.to_onnx, "write", lambda described, weights, path: path.touch())


def test_force_replaces_no_folder_of_something_else(parts, tmp_path):
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"papers holds thesis\.tex, which is not ours"):
        to_triton_server.write(plan_at(tmp_path / "e"), {}, papers, True, print)
    assert [path.name for path in papers.iterdir()] == ["thesis.tex"]


def test_every_profile_of_a_plan_is_served(parts, tmp_path):
    assert to_triton_server.write(plan_at(tmp_path / "e"), {}, tmp_path / "models", False, print) == []
    written = (tmp_path / "models" / "vstar_unet" / "config.pbtxt").read_text()
    assert 'instance_group [ { count: 1 kind: KIND_GPU profile: ["0", "1"] } ]' in written
    assert (tmp_path / "models" / "vstar_unet" / "1" / "unet.plan").read_bytes() == bytes(range(256))
    from google.protobuf import text_format

    (group,) = text_format.Parse(written, schema().ModelConfig()).instance_group
    assert list(group.profile) == ["0", "1"]


def test_the_plugins_library_goes_along_and_is_named(parts, tmp_path, monkeypatch):
    (tmp_path / "libvstar_tensorrt_autoload.so").write_text("registers")
    monkeypatch.setenv(PLUGIN, str(tmp_path / "libvstar_tensorrt.so"))
    (tmp_path / "libvstar_tensorrt.so").write_text(kernel_hash())
    versions = tensorrt_plugins.versions("cpp")
    told = to_triton_server.write(plan_at(tmp_path / "e", versions, plugin="cpp"), {}, tmp_path / "models", False, print)
    folder = tmp_path / "models" / "vstar_unet" / "1"
    assert told == [f"--backend-config=tensorrt,plugins={folder}/libvstar_tensorrt_autoload.so"]
    assert (folder / "libvstar_tensorrt_autoload.so").read_text() == "registers"
    assert (folder / "libvstar_tensorrt.so").read_text() == kernel_hash()


UNSERVED = {
    "stripped": ({"refit": "stripped"}, EngineError, "holds no weights; fill it: vstar-engine refit"),
    "python": ({"plugin": "python"}, EngineError, r"needs a plugin in Python.*rebuild it: .* --plugin aot --refit no"),
    "no library": ({"plugin": "cpp"}, ValueError, f"needs {PLUGIN} to name the library built from csrc/tensorrt"),
    "swapped": ({"plugin": "cpp"}, EngineError, "was built with cpp plugin 0{64} where"),
    "alone": ({"plugin": "cpp"}, ValueError, "there is no .*libvstar_tensorrt_autoload.so, which csrc/tensorrt builds"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_plans_that_triton_could_not_run(case, tmp_path, monkeypatch):
    options, error, complaint = UNSERVED[case]
    monkeypatch.delenv(PLUGIN, raising=False)
    versions = {}
    if case in ("swapped", "alone"):
        (tmp_path / "libvstar_tensorrt.so").write_text(kernel_hash())
        monkeypatch.setenv(PLUGIN, str(tmp_path / "libvstar_tensorrt.so"))
        versions = tensorrt_plugins.versions("cpp") if case == "alone" else {"cpp plugin": "0" * 64}
    with pytest.raises(error, match=complaint):
        to_triton_server.write(plan_at(tmp_path / "e", versions, **options), {}, tmp_path / "models", False, print)
    assert not (tmp_path / "models").exists()

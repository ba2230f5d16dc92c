"""`refit`: other weights in a built plan, by a stand-in for TensorRT. On a GPU: test_tensorrt_gpu."""

import json
import re
import shlex
import types

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import fake_tensorrt
from support.engines import engine_at

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.commands.main import build_parser, main
from vstar_engine.export import to_tensorrt
from vstar_engine.export.commands.build import settings_from
from vstar_engine.weights.checkpoint import Weights
from vstar_engine.weights.key_map import UNET

LAYER = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
OFFICIAL = f"{UNET}{LAYER}.weight"
OPTIONS = {"plugin": "aot", "opset": 21, "workspace": 8192, "level": 3, "refit": "yes", "compatibility": "exact"}
FACTS = {
    "unet": {"inputs": [{"name": "latents"}], "outputs": [{"name": "eps"}], "temporal_attentions": 12},
    "plan": {"plugin_layers": 12, "layers": 900, "bytes": 1, "profiles": [{"frames": [1, 16, 16]}, {"frames": [17, 32, 32]}]},
}
SHAPED = {"backend": "tensorrt", "device": "NVIDIA H200 sm_90", "versions": {"tensorrt": "11.4.0.0"}, "frames": [16, 32]}


@pytest.fixture(autouse=True)
def _tensorrt(monkeypatch, modules, some_gpu):
    """Stands in for the library and a GPU; the ONNX file on the way is one layer's weights."""
    names = ("ILogger", "SerializationFlag", "Runtime", "Refitter", "OnnxParserRefitter")
    library = types.SimpleNamespace(__version__="11.4.0.0", **{name: getattr(fake_tensorrt, name) for name in names})
    modules({"tensorrt": library})
    monkeypatch.setattr("vstar_engine.export.commands.refit.device_named", lambda name, dtype: torch.device(name))
    some_gpu()

    def write(network, weights, path, opset, report):
        path.write_bytes(weights[OFFICIAL].float().numpy().tobytes())

    monkeypatch.setattr(to_tensorrt.to_onnx, "write", write)


def plan_at(folder, options=OPTIONS, **held):
    content = json.dumps({"refittable": True, "weights": "", **held}).encode()
    return engine_at(folder, file="unet.plan", facts=FACTS, content=content, options=options, **SHAPED)


def held(artifact):
    """The weights in an engine's plan."""
    return torch.frombuffer(
        bytearray.fromhex(json.loads(artifact.file("unet.plan").read_bytes())["weights"]), dtype=torch.float32
    )


def check_facts(artifact, kept):
    """What a plan is stays said when its weights change."""
    plan = artifact.manifest["facts"]["plan"]
    assert artifact.manifest["facts"]["unet"] == kept["unet"]
    assert {name: plan[name] for name in ("plugin_layers", "layers", "profiles")} == {
        name: kept["plan"][name] for name in ("plugin_layers", "layers", "profiles")
    }
    assert plan["refitted"]
    assert plan["bytes"] == artifact.file("unet.plan").stat().st_size


def test_other_weights_of_the_same_shapes(mini_weights, tmp_path):
    tensors = load_file(mini_weights / "model.safetensors")
    tensors[OFFICIAL] = tensors[OFFICIAL] + 1
    save_file(tensors, tmp_path / "other.safetensors")
    folder = plan_at(tmp_path / "e")
    assert main(["refit", str(folder), "--weights", str(tmp_path / "other.safetensors"), "--out", str(tmp_path / "r")]) == 0
    made = BuiltEngine.open(tmp_path / "r")
    assert torch.equal(held(made), tensors[OFFICIAL].float().flatten())
    assert made.identity["weights"] == Weights(tmp_path / "other.safetensors").fingerprint()
    assert made.manifest["weights_path"] == str(tmp_path / "other.safetensors")
    assert made.identity["options"] == OPTIONS
    check_facts(made, FACTS)


def test_a_lora_is_merged_into_a_built_plan(mini_weights, tmp_path):
    before = Weights(mini_weights)[OFFICIAL].float()
    out, into = before.shape[:2]
    down, up = torch.randn(2, into), torch.randn(out, 2)
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    parts = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(parts, tmp_path / "style.safetensors")
    words = ["refit", str(plan_at(tmp_path / "e")), "--lora", f"{tmp_path / 'style.safetensors'}:0.5"]
    assert main([*words, "--out", str(tmp_path / "r")]) == 0
    made = BuiltEngine.open(tmp_path / "r")
    assert torch.allclose(held(made), (before + 0.5 * (up @ down).view(before.shape)).flatten(), atol=1e-5)
    assert not torch.allclose(held(made), before.flatten(), atol=1e-2)
    assert made.identity["weights"] != Weights(mini_weights).fingerprint()
    (lora,) = made.manifest["loras"]
    assert lora.startswith(str(tmp_path / "style.safetensors"))
    check_facts(made, FACTS)
    # what is there already, shaped by the same, is not made again; a refitted plan is refitted again
    assert main([*words, "--out", str(tmp_path / "r")]) == 0
    assert main(["refit", str(tmp_path / "r"), "--out", str(tmp_path / "again")]) == 0
    assert torch.equal(held(BuiltEngine.open(tmp_path / "again")), before.flatten())


def test_a_stripped_plan_is_filled(mini_weights, tmp_path):
    folder = plan_at(tmp_path / "e", {**OPTIONS, "refit": "stripped"})
    assert main(["refit", str(folder), "--out", str(tmp_path / "r")]) == 0
    made = BuiltEngine.open(tmp_path / "r")
    assert torch.equal(held(made), Weights(mini_weights)[OFFICIAL].float().flatten())
    assert made.identity["options"]["refit"] == "yes"


PLANS = {
    "other shapes": ({"other shapes": True}, "the weights do not fit .*: conv_in has other shapes"),
    "missing": ({"missing": ["a", "b"]}, "2 weights of .* are in no file: a, b"),
    "fails": ({"fails": True}, "cannot refit .*: out of memory"),
    "not for it": ({"refittable": False}, "was not built for other weights; build it with --refit yes"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_cannot_be_refitted_leaves_nothing(case, tmp_path, capsys):
    changed, complaint = PLANS[case]
    assert main(["refit", str(plan_at(tmp_path / "e", **changed)), "--out", str(tmp_path / "r")]) == 9
    assert_said(capsys, complaint)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_plan_that_the_library_cannot_load(tmp_path, capsys):
    folder = engine_at(tmp_path / "e", file="unet.plan", facts=FACTS, options=OPTIONS, **SHAPED)
    assert main(["refit", str(folder), "--out", str(tmp_path / "r")]) == 9
    assert_said(capsys, "TensorRT 11.4.0.0 cannot load .*unet.plan: the plan's magic tag does not match")


KEPT = {
    "onnxruntime": ({"opset": 21}, "--opset 21"),
    "tensorrt-rtx": ({"plugin": "python", "opset": 21, "targets": ["SM80", "SM89"]}, "--targets SM80,SM89"),
}


@pytest.mark.parametrize("backend", KEPT)
def test_an_engine_that_keeps_its_weights_is_built_with_the_others(backend, tmp_path, capsys):
    options, shown = KEPT[backend]
    folder = engine_at(tmp_path / "e", backend=backend, options=options)
    assert main(["refit", str(folder), "--weights", "other weights", "--lora", "a.safetensors:0.5"]) == 9
    said = capsys.readouterr().err
    assert f"{folder} is for backend {backend}, whose engines keep the weights that they were built with" in said
    command = said[said.index("vstar-engine build") :]
    assert shown in command
    args = build_parser()[0].parse_args(shlex.split(command)[1:])
    assert (args.weights, args.lora) == ("other weights", ["a.safetensors:0.5"])
    assert settings_from(args).backend == backend, "what is said to build can be built"


def test_an_engine_that_was_not_built_for_it(tmp_path, capsys):
    folder = plan_at(tmp_path / "e", {**OPTIONS, "refit": "no"})
    assert main(["refit", str(folder)]) == 9
    said = capsys.readouterr().err
    assert "was not built for other weights; rebuild it: vstar-engine build" in said
    assert "--refit yes" in said
    assert "--refit no" not in said


def assert_said(capsys, complaint):
    assert re.search(complaint, capsys.readouterr().err)

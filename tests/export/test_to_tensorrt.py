"""What a TensorRT build decides before and after TensorRT's part: profiles, plugins, options, refusals."""

import dataclasses
import importlib.util
import json
import stat
import types
from pathlib import Path

import support.onnx_packages  # noqa: F401 - skips this module where the packages are missing

# isort: split
import pytest
import torch

from support import fake_tensorrt
from support.engines import engine_at

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.files import sha256
from vstar_engine.backends import backend_named, tensorrt_plugins, tensorrt_rtx
from vstar_engine.backends.tensorrt import TensorrtUnet, gpu, open_plan
from vstar_engine.commands.main import main
from vstar_engine.config.models import MODELS
from vstar_engine.errors import DeviceError, EngineError, ExportError, MissingLibrary, OutputError
from vstar_engine.export import to_tensorrt
from vstar_engine.export.build_settings import TENSORRT_FRAMES, Settings
from vstar_engine.export.builders import builder_named
from vstar_engine.export.tensorrt_plan import check_count, count_in_engine, frame_profiles
from vstar_engine.kernels.source_hash import kernel_hash

MINI = MODELS["mini"]


def test_profiles_follow_one_another():
    profiles = frame_profiles((16, 32, 128), {"batch": (1, 2, 8)})
    assert [profile["frames"] for profile in profiles] == [(1, 16, 16), (17, 32, 32), (33, 128, 128)]
    assert all(profile["batch"] == (1, 2, 8) for profile in profiles)


def test_free_axes_reach_from_the_least_size_to_the_models_own():
    fixed, free = Settings(MINI, "tensorrt-rtx", size=(64, 96), batch=1), Settings(MINI, "tensorrt-rtx")
    assert to_tensorrt.free_axes(fixed) == {"batch": (1, 1, 1)}
    assert to_tensorrt.free_axes(free) == {"batch": (1, 2, 8), "height": (4, 12, 16), "width": (4, 16, 16)}
    assert free.frames == TENSORRT_FRAMES


def test_auto_takes_the_plugin_that_can_serve(monkeypatch, tmp_path):
    monkeypatch.delenv(tensorrt_plugins.LIBRARY, raising=False)
    assert [tensorrt_plugins.choose("auto", rtx) for rtx in (False, True)] == ["aot", "python"]
    library = tmp_path / "libvstar_tensorrt.so"
    monkeypatch.setenv(tensorrt_plugins.LIBRARY, str(library))
    with pytest.raises(ValueError, match="which is not a file; build the plugin in csrc/tensorrt"):
        tensorrt_plugins.choose("auto", rtx=True)
    library.touch()
    assert [tensorrt_plugins.choose("auto", rtx) for rtx in (False, True)] == ["aot", "cpp"]
    assert tensorrt_plugins.choose("cpp", rtx=False) == "cpp"


REFUSED = {
    "unknown plugin": ({"plugin": "magic"}, "plugin must be one of auto, aot, cpp, python, none, got 'magic'"),
    "aot for rtx": ({"backend": "tensorrt-rtx", "plugin": "aot"}, "takes no quickly deployable plugins"),
    "cpp without library": ({"plugin": "cpp"}, "needs VSTAR_TENSORRT_PLUGIN"),
    "bfloat16": ({"dtype": torch.bfloat16}, "float32 or float16, got bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_make_no_sense_are_refused(case, monkeypatch):
    monkeypatch.delenv(tensorrt_plugins.LIBRARY, raising=False)
    given, sentence = REFUSED[case]
    settings = Settings(MINI, given.pop("backend", "tensorrt"), **given)
    with pytest.raises(ValueError, match=sentence):
        builder_named(settings.backend).options(settings)


def test_the_identity_holds_what_shapes_a_plan():
    settings = Settings(MINI, "tensorrt", workspace=512, level=5, compatibility="ampere", refit="yes", timing_cache=Path("t"))
    options = to_tensorrt.options(settings)
    shaped = {"opset": 21, "workspace": 512, "level": 5, "refit": "yes", "compatibility": "ampere"}
    assert options == {"plugin": "aot", **shaped}
    rebuilt = Settings.of(settings.identity("", {}, options), settings.device)
    assert rebuilt == dataclasses.replace(settings, plugin="aot", timing_cache=None)
    rtx = Settings(MINI, "tensorrt-rtx", targets=("SM89",))
    assert to_tensorrt.options(rtx)["targets"] == ["SM89"]
    assert Settings.of(rtx.identity("", {}, to_tensorrt.options(rtx)), rtx.device).targets == ("SM89",)


def test_a_guess_is_near_what_was_measured():
    full = Settings(MODELS["videocrafter2"], "tensorrt-rtx", dtype=torch.float16, frames=(16, 64))
    guess = to_tensorrt.estimate(full)
    assert guess.seconds == pytest.approx(168, rel=0.1)
    assert guess.memory / 2**30 == pytest.approx(11.8, rel=0.1)
    assert guess.disk / 2**30 == pytest.approx(2 * 2.63, rel=0.01)
    assert "11.8 GiB" in guess.basis
    assert "no build" in to_tensorrt.estimate(Settings(MINI, "tensorrt")).basis


def test_a_dry_run_says_what_a_plan_would_be(monkeypatch, modules, capsys):
    modules({"tensorrt_rtx": types.SimpleNamespace(__version__="1.7.1.116")})
    monkeypatch.delenv(tensorrt_plugins.LIBRARY, raising=False)
    words = ["build", "--model", "mini", "--backend", "tensorrt-rtx", "--frames", "16,32", "--size", "any", "--dry-run"]
    assert main([*words, "--opset", "18", "--targets", "SM89,SM120"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (said["plugin"], said["opset"], said["targets"]) == ("python", "18", "SM89, SM120")
    assert said["profiles"] == "batch 1 to 8, height 4 to 16, width 4 to 16, frames 1 to 16"
    assert said["batch"].startswith("1 to 8, height 4 to 16, width 4 to 16, frames 17 to 32"), "the second profile's line"
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["profiles"][1]["frames"] == [17, 32, 32]
    assert (plan["plugin"], plan["opset"], plan["targets"]) == ("python", 21, ["SM80", "SM86", "SM89", "SM120"])


@pytest.mark.parametrize(("capability", "named"), [((8, 9), ("any sm_89", 89)), ((10, 3), ("any sm_103", 80))], ids=str)
def test_an_engine_names_the_gpus_that_share_it(some_gpu, capability, named):
    device = torch.device("cuda")
    some_gpu("NVIDIA H200", capability)
    assert gpu(device, "exact") == f"NVIDIA H200 sm_{capability[0]}{capability[1]}"
    settings = Settings(MINI, "tensorrt", device=device)
    assert (gpu(device, "capability"), to_tensorrt.architecture(settings)) == named
    assert gpu(device, "ampere") == "any from sm_80 on"
    # later GPUs run sm_80's PTX and not one another's
    assert to_tensorrt.architecture(dataclasses.replace(settings, compatibility="ampere")) == 80


def test_a_gpu_before_ampere_shares_no_ampere_engine(some_gpu):
    some_gpu("Tesla T4", (7, 5))
    with pytest.raises(DeviceError, match="for GPUs of sm_80 and later, got Tesla T4 sm_75"):
        gpu(torch.device("cuda"), "ampere")


def test_a_timing_cache_that_cannot_be_written_is_said_first(modules, tmp_path):
    modules({"tensorrt": types.SimpleNamespace(__version__="11.4.0.0")})
    settings = Settings(MINI, "tensorrt", timing_cache=tmp_path / "none" / "t")
    with pytest.raises(OutputError, match="there is no folder"):
        to_tensorrt.build(settings, {}, tmp_path, print)


def test_kept_timings_lie_among_the_engines_and_as_private(monkeypatch, some_gpu, tmp_path):
    monkeypatch.setenv("VSTAR_ENGINES", str(tmp_path / "deep" / "engines"))
    some_gpu()
    path = to_tensorrt._timing_cache(types.SimpleNamespace(__version__="11.4.0.0"), torch.device("cuda"))
    assert path.name.startswith("tensorrt-11.4.0.0-sm_90-")
    for made in (path.parent, path.parent.parent, path.parent.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_layer_that_is_no_plugin_fails_the_build():
    check_count(34, 34, "the parsed network")
    with pytest.raises(ExportError, match="holds 33 plugin layers where the file has 34 temporal attentions"):
        check_count(33, 34, "the parsed network")


def test_an_engines_plugins_are_counted_once_for_all_profiles():
    layers = [{"Name": name, "LayerType": "PluginV3"} for name in ("a", "b", "a [profile 1]", "b [profile 1]")]
    layers += [{"Name": "c", "LayerType": "Convolution"}, "d"]
    assert count_in_engine(json.dumps({"Layers": layers})) == 2


@pytest.mark.parametrize(("backend", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_a_missing_library_says_what_to_install(backend, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed here")
    with pytest.raises(MissingLibrary, match=f"backend {backend} needs the {module} package .*pip install"):
        backend_named(backend).requirements(torch.device("cuda"), {})


@dataclasses.dataclass
class Registry:
    """A plugin registry that keeps what it is given."""

    held: dict = dataclasses.field(default_factory=dict)

    def get_creator(self, name, version, namespace):
        return self.held.get((name, version, namespace))


class Library:
    """As much of a TensorRT as registering takes."""

    __version__ = "11.4.0.0"

    def __init__(self, name):
        self.__name__, self.registry = name, Registry()

    def get_plugin_registry(self):
        return self.registry


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_keeps_to_the_library_of_its_plugin(backend, monkeypatch, modules, some_gpu, tmp_path):
    path = tmp_path / "libvstar_tensorrt.so"
    path.write_bytes(b"\x7fELF" + kernel_hash().encode())
    monkeypatch.setenv(tensorrt_plugins.LIBRARY, str(path))
    some_gpu()
    modules(dict.fromkeys(("tensorrt", "tensorrt_rtx"), types.SimpleNamespace(__version__="11.4.0.0")))
    options = {"plugin": "cpp", "compatibility": "exact"}

    def requirements():
        return backend_named(backend).requirements(torch.device("cuda"), options)

    assert requirements()["versions"] == {backend: "11.4.0.0", "cpp plugin": sha256(path)}
    built = BuiltEngine.open(engine_at(tmp_path / "e", backend=backend, options=options, **requirements()))
    built.check(**requirements())
    path.write_bytes(path.read_bytes() + b"swapped")
    with pytest.raises(
        EngineError, match=r"built with cpp plugin \w{64} where \w{64} is installed; rebuild it: .*--plugin cpp"
    ):
        built.check(**requirements())
    path.write_bytes(b"\x7fELF of other kernels")
    with pytest.raises(EngineError, match=r"libvstar_tensorrt.so was built from other kernels than are installed here"):
        requirements()
    monkeypatch.delenv(tensorrt_plugins.LIBRARY)
    with pytest.raises(ValueError, match="the cpp plugin needs VSTAR_TENSORRT_PLUGIN to name the library"):
        requirements()


def test_one_plugin_serves_a_process(monkeypatch):
    library = Library("first")

    def take(trt, kind, arch):
        trt.registry.held["VstarTemporalAttention", "1", "vstar"] = kind

    monkeypatch.setattr(tensorrt_plugins, "_register", take)
    tensorrt_plugins.register(library, "none")
    tensorrt_plugins.register(library, "aot", 90)
    tensorrt_plugins.register(library, "aot", 90)
    for kind, arch in (("python", None), ("aot", 80)):
        with pytest.raises(EngineError, match="has registered the plugin aot for sm_90 already"):
            tensorrt_plugins.register(library, kind, arch)
    other = Library("second")
    other.registry.held["VstarTemporalAttention", "1", "vstar"] = "a library's"
    with pytest.raises(EngineError, match="has registered the plugin of another origin already"):
        tensorrt_plugins.register(other, "python")


class Engine:
    """As much of an engine as choosing a profile takes: frames 1 to 16 and 17 to 32."""

    num_optimization_profiles = 2

    def get_tensor_profile_shape(self, name, index):
        low, high = ((1, 16), (17, 32))[index]
        return [(1, 4, low, 8, 8), (2, 4, high, 8, 8), (2, 4, high, 8, 16)]


def test_the_profile_follows_the_frames():
    unet = TensorrtUnet(None, Engine(), torch.device("cpu"), torch.float32)
    assert [unet.profile((2, 4, frames, 8, 8)) for frames in (1, 16, 17, 32)] == [0, 0, 1, 1]
    for shape in ((2, 4, 33, 8, 8), (3, 4, 16, 8, 8), (1, 4, 16, 16, 8)):
        with pytest.raises(EngineError, match=r"the engine takes latents of \(1, 4, 1, 8, 8\) to \(2, 4, 16, 8, 16\), "):
            unet.profile(shape)


def artifact(**options):
    return BuiltEngine(Path("engine"), {"identity": {"options": options}})


def test_what_cannot_run_is_refused_before_it_is_loaded():
    with pytest.raises(DeviceError, match="runs on an NVIDIA GPU, got device cpu"):
        open_plan(None, artifact(plugin="aot"), torch.device("cpu"), torch.float16)
    with pytest.raises(EngineError, match="holds no weights; fill it: vstar-engine refit"):
        open_plan(None, artifact(plugin="aot", refit="stripped"), torch.device("cuda"), torch.float16)


def test_a_plan_that_tensorrt_cannot_load(some_gpu, tmp_path):
    some_gpu()
    options = {"plugin": "aot", "refit": "no"}
    damaged = BuiltEngine.open(engine_at(tmp_path / "e", file="unet.plan", backend="tensorrt", options=options))
    library = types.SimpleNamespace(__version__="11.4.0.0", ILogger=fake_tensorrt.ILogger, Runtime=fake_tensorrt.Runtime)
    complaint = r"TensorRT 11.4.0.0 cannot load .*e: the plan's magic tag does not match; rebuild it: vstar-engine build "
    with pytest.raises(EngineError, match=complaint):
        open_plan(library, damaged, torch.device("cuda"), torch.float32)


def test_a_gpu_that_is_no_target_of_an_rtx_plan(monkeypatch, modules, some_gpu, tmp_path):
    opened = []
    some_gpu("an RTX", (12, 0))
    modules({"tensorrt_rtx": types.SimpleNamespace(__version__="1.7.1.116")})
    monkeypatch.setattr(tensorrt_rtx, "open_plan", lambda trt, artifact, device, dtype, graphs: opened.append(device))
    options = {"plugin": "python", "targets": ["SM86", "SM89"]}
    built = BuiltEngine.open(
        engine_at(tmp_path / "e", file="unet.plan", backend="tensorrt-rtx", device="cuda", options=options)
    )
    complaint = r"was built for SM86, SM89, got an RTX sm_120; build one for it: .*--targets SM86,SM89,SM120$"
    with pytest.raises(EngineError, match=complaint):
        tensorrt_rtx.load(built, device=torch.device("cuda", 1), dtype=torch.float16)
    assert not opened
    some_gpu("an RTX", (8, 9))
    tensorrt_rtx.load(built, device=torch.device("cuda", 1), dtype=torch.float16)
    assert opened == [torch.device("cuda", 1)]

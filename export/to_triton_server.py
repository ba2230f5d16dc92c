"""A built engine as a model repository of Triton Inference Server: the three networks and an orchestrator that streams."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.files import check_writable, write_aside
from vstar_engine.backends import tensorrt_plugins
from vstar_engine.config.models import Spec, model_named
from vstar_engine.errors import EngineError
from vstar_engine.machine.device import dtype_named

from . import to_onnx, traced_networks
from .builders import Report

# the UNet's file of each back end that Triton can serve, and what Triton calls its runtime
SERVED = {"onnxruntime": ("unet.onnx", 'backend: "onnxruntime"'), "tensorrt": ("unet.plan", 'platform: "tensorrt_plan"')}
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32", "uint8": "TYPE_UINT8"}
STREAMS = """name: "vstar"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "STATES" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "SETTINGS" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [
  { name: "STEP" data_type: TYPE_INT32 dims: [ 2 ] },
  { name: "VIDEO" data_type: TYPE_UINT8 dims: [ -1, -1, -1, 3 ] }
]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


def config(name: str, file: str, runtime: str, facts: Mapping[str, Any], cuda: bool, profiles: int = 0) -> str:
    """Writes a network's config.pbtxt; every axis is its own, so that Triton batches nothing by itself.

    Of a plan's `profiles` all are named: Triton takes the first alone where none is.
    """

    def tensors(entries: list[dict[str, Any]]) -> str:
        lines = []
        for entry in entries:
            dims = ", ".join(str(size if isinstance(size, int) else -1) for size in entry["shape"])
            lines.append(f'  {{ name: "{entry["name"]}" data_type: {TYPES[entry["dtype"]]} dims: [ {dims} ] }}')
        return ",\n".join(lines)

    kind = "KIND_GPU" if cuda else "KIND_CPU"
    served = f" profile: {json.dumps([str(index) for index in range(profiles)])}" if profiles else ""
    return (
        f'name: "{name}"\n{runtime}\ndefault_model_filename: "{file}"\nmax_batch_size: 0\n'
        f"input [\n{tensors(facts['inputs'])}\n]\noutput [\n{tensors(facts['outputs'])}\n]\n"
        f"instance_group [ {{ count: 1 kind: {kind}{served} }} ]\n"
    )


def write(artifact: BuiltEngine, weights: Mapping[str, Tensor], out: Path, force: bool, report: Report) -> list[str]:
    """Writes the repository; returns the server options that it needs besides its path.

    Raises EngineError for an engine that Triton cannot serve, ValueError where its plugin's library is not there.
    """
    backend, identity, facts = artifact.identity["backend"], artifact.identity, artifact.manifest["facts"]
    if backend not in SERVED:
        raise EngineError(f"{artifact.folder} is for backend {backend}; Triton Inference Server takes {', '.join(SERVED)}")
    plugins = _plugins(artifact) if backend == "tensorrt" else []
    check_writable(out, force, made=("vstar", "vstar_*"))
    spec, cuda = model_named(identity["model"]), not identity["device"].startswith("cpu")
    with write_aside(out, folder=True) as repository:
        file, runtime = SERVED[backend]
        report("copying the UNet")
        profiles = len(facts["plan"]["profiles"]) if backend == "tensorrt" else 0
        unet = _version(repository, "vstar_unet", config("vstar_unet", file, runtime, facts["unet"], cuda, profiles))
        for name in (file, f"{file}.data"):
            if name in (entry["name"] for entry in artifact.manifest["files"]):
                shutil.copyfile(artifact.file(name), unet / name)
        for library in plugins:
            shutil.copyfile(library, unet / library.name)
        for part in ("decoder", "text"):
            report(f"writing the {part}")
            _part(artifact, weights, spec, part, repository, cuda)
        orchestrator = _version(repository, "vstar", STREAMS)
        shutil.copyfile(Path(__file__).parent / "triton_server_model.py", orchestrator / "model.py")
        shutil.copyfile(artifact.folder / "manifest.json", orchestrator / "engine.json")
    return [f"--backend-config=tensorrt,plugins={out / 'vstar_unet' / '1' / library.name}" for library in plugins[:1]]


def _plugins(artifact: BuiltEngine) -> list[Path]:
    """Returns the libraries that a plan needs in the server, the one to be told first; refuses a plan that cannot run there."""
    options = artifact.identity["options"]
    if options["refit"] == "stripped":
        raise EngineError(f"{artifact.folder} holds no weights; fill it: vstar-engine refit {artifact.folder} --weights DIR")
    if options["plugin"] == "python":
        rebuild = artifact.command(options={**options, "plugin": "aot"})
        raise EngineError(f"{artifact.folder} needs a plugin in Python, which Triton runs for no plan; rebuild it: {rebuild}")
    artifact.check(versions=tensorrt_plugins.versions(options["plugin"]))
    return tensorrt_plugins.autoloaded() if options["plugin"] == "cpp" else []


def _version(repository: Path, name: str, configuration: str) -> Path:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(configuration)
    return folder


def _part(artifact: BuiltEngine, weights: Mapping[str, Tensor], spec: Spec, part: str, repository: Path, cuda: bool) -> None:
    """Writes the decoder or the text tower: as it was built, or from the weights where the engine holds the UNet alone."""
    dtype, name, file = dtype_named(artifact.identity["dtype"]), f"vstar_{part}", f"{part}.onnx"
    described = _described(spec, part, dtype)
    folder = _version(repository, name, config(name, file, SERVED["onnxruntime"][1], described.described(), cuda))
    if part in artifact.manifest["facts"]:
        for each in (file, f"{file}.data"):
            shutil.copyfile(artifact.file(each), folder / each)
    else:
        to_onnx.write(described, weights, folder / file)


def _described(spec: Spec, part: str, dtype: torch.dtype) -> traced_networks.Network:
    return traced_networks.decoder(spec.vae, dtype) if part == "decoder" else traced_networks.text(spec.text, dtype)

"""What this machine has: devices, versions, and optional libraries present or missing and why."""

import platform
from dataclasses import dataclass
from importlib import import_module, metadata

import torch

from vstar_engine.backends import TENSORRT, tensorrt_library
from vstar_engine.errors import MissingLibrary
from vstar_engine.kernels.cpu import library
from vstar_engine.machine import memory, threads
from vstar_engine.version import __version__

OPTIONAL = {
    "triton": "the fused kernels on NVIDIA GPUs",
    "onnxruntime": "--backend onnxruntime",
    "onnxscript": "building for it",
    "xformers": "--spatial-attention xformers",
    "tokenizers": "prompts",
    "ftfy": "prompts",
    "httpx": "synopses by a language model",
    "huggingface_hub": "weights from the Hub",
    "av": "mp4 files",
    "PIL": "gif files",
}


@dataclass(frozen=True)
class Fact:
    """One line of the report; `ok` is None where nothing can be wrong."""

    name: str
    value: str
    ok: bool | None = None


def examine() -> list[Fact]:
    """Lists facts about this installation and machine."""
    free = memory.available_bytes(torch.device("cpu")) / 2**30
    facts = [
        Fact("vstar-engine", __version__),
        Fact("python", f"{platform.python_version()} on {platform.platform()}"),
        Fact("torch", torch.__version__),
        *cpu_facts(torch.get_num_threads(), threads.cores(), free),
    ]
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        facts.append(Fact("cuda", f"no device: this PyTorch is {built}", False))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free = memory.available_bytes(torch.device("cuda", i)) / 2**30
        size = f"{free:.1f} of {properties.total_memory / 2**30:.1f} GiB free"
        facts.append(Fact(f"cuda:{i}", f"{properties.name}, sm_{properties.major}{properties.minor}, {size}", True))
    native_there, native_says = library.status()
    facts.append(
        Fact("cpu kernel", native_says if native_there else f"missing, the reference serves: {native_says}", native_there)
    )
    return facts + [_library(name, use) for name, use in OPTIONAL.items()] + [_tensorrt(backend) for backend in TENSORRT]


def cpu_facts(in_use: int, cores: threads.Cores, free: float) -> list[Fact]:
    """Describes the cores, and how threads use them; `free` is in GiB."""
    said = f"{in_use} in use"
    if in_use > cores.usable:
        said += f", more than the {cores.usable} that have a core each: set {threads.COUNT}={cores.usable}, or leave it unset"
    waiting = threads.waiting() or "by OpenMP's default"
    if threads.spins() and in_use > 1:
        waiting += f": idle threads spin, which is slow beside a busy process; set {threads.POLICY}={threads.PASSIVE}"
    quota = "none" if cores.quota is None else f"{cores.quota:g} cores, by the control group"
    return [
        Fact("cpu", f"{cores.machine} cores, {cores.allowed} allowed to this process, {free:.1f} GiB of memory free"),
        Fact("cpu quota", quota),
        Fact("threads", said, in_use <= cores.usable),
        Fact("waiting", waiting, not threads.spins() or in_use == 1),
    ]


def _tensorrt(backend: str) -> Fact:
    try:
        return Fact(backend, f"{tensorrt_library.library(backend).__version__}, for --backend {backend}", True)
    except MissingLibrary as error:
        return Fact(backend, f"missing: {error}", False)
    except Exception as error:  # as above, of what TensorRT loads
        return Fact(backend, f"broken: {type(error).__name__}: {error}", False)


def _library(name: str, use: str) -> Fact:
    try:
        module = import_module(name)
    except ImportError as error:
        return Fact(name, f"missing ({error}); needed for {use}", False)
    except Exception as error:  # whatever a library raises where one below it does not fit
        return Fact(name, f"broken ({type(error).__name__}: {error}); needed for {use}", False)
    version = getattr(module, "__version__", None) or metadata.version(name)
    return Fact(name, f"{version}, for {use}", True)

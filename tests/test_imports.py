"""Imports point down only, and heavy libraries load when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a module may import those on lines above it, or on its own line
ORDER = [
    ["errors", "timeline", "config", "kernels", "threads"],
    ["artifacts", "device", "golden", "allocator", "layers", "sources"],
    ["built", "client"],
    ["offline", "llm", "synopsis", "text", "schedule", "tar", "spatial_attention", "step_cache", "unet", "vae", "video"],
    ["checkpoint", "embeddings", "sampling", "step", "memory", "analysis"],
    ["convert", "synthetic", "lora", "fp8"],
    ["bundled", "backends", "export", "lora_list"],
    ["batch", "choice", "remarks", "room", "warm"],
    ["engine", "verify", "doctor"],
    ["options", "prompting", "plan", "provenance", "generate", "embed", "build", "remote", "bench"],
    ["serving"],
    ["cli"],
]
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line}


def modules():
    for path in sorted((ROOT / "vstar_engine").rglob("*.py")):
        relative = path.relative_to(ROOT / "vstar_engine")
        if relative.parts[0] not in ("__init__.py", "__main__.py"):
            yield relative.parts[0].removesuffix(".py"), path
    for folder in ("kernels", "export", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path


def imported(path):
    """Names the engine's modules that a file imports, wherever in it."""
    inside = path.is_relative_to(ROOT / "vstar_engine")
    depth = len(path.relative_to(ROOT / "vstar_engine").parts) if inside else 1
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").split(".")
        if node.level == depth and inside:
            yield from [alias.name for alias in node.names] if module == [""] else [module[0]]
        elif module[0] == "vstar_engine":
            yield from [alias.name for alias in node.names] if len(module) == 1 else [module[1]]


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: "" if isinstance(value, str) else str(value.name))
def test_imports_point_down(name, path):
    known = [target for target in imported(path) if target in RANK]
    upward = [target for target in known if RANK[target] > RANK[name]]
    assert not upward
    if name == "kernels":
        assert set(known) <= {"kernels"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vstar_engine", ["torch", "numpy"]),
        (
            "vstar_engine.cli",
            ["av", "PIL", "tokenizers", "ftfy", "xformers", "triton", "psutil", "httpx", "matplotlib", "onnx", "onnxruntime"],
        ),
        ("vstar_engine.threads", ["torch", "numpy"]),
        ("vstar_engine.serving.app", ["torch", "av", "PIL", "ray"]),
        ("vstar_engine.serving.worker", ["torch", "av", "PIL", "dbos", "fastapi"]),
        ("vstar_engine.bench.__main__", ["av", "PIL", "tokenizers", "ftfy", "psutil", "tqdm", "httpx", "matplotlib"]),
    ],
)
def test_heavy_libraries_wait(module, absent):
    build = "getattr(module, 'build_parser', int)()"
    code = f"import sys, {module} as module; {build}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", ["serve", "synopsis", "submit", "status", "fetch", "cancel", "inspect", "doctor", "--help"])
def test_commands_that_compute_nothing_do_not_wait_for_pytorch(command):
    """A server loads it in its worker alone, which halves the time until it answers."""
    code = f"import sys; from vstar_engine.cli import build_parser; build_parser({command!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False"]

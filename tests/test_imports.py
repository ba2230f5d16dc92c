"""Imports point down only, without circles, and heavy libraries load when they are used."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vstar_engine"
# a room may import those on the floors below it, and others of its own floor where that makes no circle
FLOORS = [
    ["errors", "version"],
    ["kernels", "config"],
    ["networks", "artifacts"],
    ["prompting", "machine", "video", "fragments", "video_input", "client"],
    ["sampling"],
    ["weights"],
    ["backends"],
    ["model_choice", "loading", "warmup"],
    ["engine", "streaming", "enhancing"],
    ["analysis", "verification", "export", "integrations"],
    ["serving"],
    ["commands", "export.commands", "bench"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def modules():
    """Maps the dotted name below the package of every module to its file."""
    found = {}
    for folder in (PACKAGE, "kernels", "export", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / PACKAGE if folder == PACKAGE else ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path):
    """Names the engine's modules that a module imports, wherever in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        words = (node.module or "").split(".") if node.module else []
        if node.level:
            words = [*package[: len(package) - node.level + 1], *words]
        elif words[0] == PACKAGE:
            words = words[1:]
        else:
            continue
        for alias in node.names:
            inside = ".".join([*words, alias.name])
            yield inside if inside in modules() else ".".join(words)


@cache
def graph():
    return {name: set(imported(name, path)) - {name, ""} for name, path in modules().items() if name not in ("", "__main__")}


def room_of(name):
    while name and name not in FLOOR:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("name", list(graph()))
def test_imports_point_down(name):
    assert room_of(name), f"{name} is in no room of FLOORS"
    assert [target for target in graph()[name] if FLOOR[room_of(target)] > FLOOR[room_of(name)]] == []
    if room_of(name) == "kernels":
        assert {room_of(target) for target in graph()[name]} <= {"kernels"}


def circle(edges):
    """Returns a circle of a graph, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_by_way_of_others():
    assert circle(graph()) == []


def test_no_room_imports_itself_by_way_of_others():
    rooms = {}
    for name, targets in graph().items():
        rooms.setdefault(room_of(name), set()).update(map(room_of, targets))
    assert circle({room: targets - {room} for room, targets in rooms.items()}) == []


def test_kernels_read_options_in_their_commands_alone():
    readers = [name for name, path in modules().items() if name.startswith("kernels.") and "argparse" in path.read_text()]
    assert readers == ["kernels.aot.__main__", "kernels.tensorrt.__main__"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vstar_engine", ["torch", "numpy"]),
        (
            "vstar_engine.commands.main",
            ["av", "PIL", "tokenizers", "ftfy", "xformers", "triton", "psutil", "httpx", "matplotlib", "onnx", "onnxruntime"],
        ),
        ("vstar_engine.machine.threads", ["torch", "numpy"]),
        ("vstar_engine.serving.http.app", ["torch", "av", "PIL", "ray"]),
        ("vstar_engine.serving.workers.worker", ["torch", "av", "PIL", "dbos", "fastapi"]),
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
    build = f"from vstar_engine.commands.main import build_parser; build_parser({command!r})"
    code = f"import sys; {build}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False"]

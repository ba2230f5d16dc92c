"""TensorRT's own Python wheels in a scratch folder, for tests: never part of the project or of its environment.

The wheels are NVIDIA's and proprietary, so nothing of them is kept here. The bindings alone have no library to load; a
stand-in of nine symbols, compiled by the test, lets them be imported, with every class and signature but no builder.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import scratch

ROOT = Path(__file__).parents[2]
BINDINGS = {
    "10.13": "tensorrt_cu12_bindings==10.13.3.9.post1",
    "10.16": "tensorrt_cu13_bindings==10.16.1.11",
    "11.0": "tensorrt_cu13_bindings==11.0.0.114",
    "11.4": "tensorrt_cu13_bindings==11.4.0.106",
}
RTX = "1.7.1.116"
SYMBOLS = """
#include <stddef.h>
#include <stdint.h>
void *createInferBuilder_INTERNAL(void *a, int32_t b) { return NULL; }
void *createInferRuntime_INTERNAL(void *a, int32_t b) { return NULL; }
void *createInferRefitter_INTERNAL(void *a, void *b, int32_t c) { return NULL; }
void *createNvOnnxParser_INTERNAL(void *a, void *b, int32_t c) { return NULL; }
void *createNvOnnxParserRefitter_INTERNAL(void *a, void *b, int32_t c) { return NULL; }
void *getBuilderPluginRegistry(int32_t a) { return NULL; }
void *getPluginRegistry(void) { return NULL; }
int32_t getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *a, char const *b) { return 0; }
"""


def bindings(version: str) -> dict[str, str]:
    """Returns the environment in which a child process imports the bindings of a version over the nine symbols."""
    if shutil.which("gcc") is None:
        scratch.lack("needs gcc, to compile the nine symbols that the bindings want")
    folder = scratch.installed(f"tensorrt-{version}", BINDINGS[version])
    libraries = folder / "stand_in"
    if not libraries.exists():
        aside = folder / f"stand_in.{os.getpid()}"
        aside.mkdir()
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            soname = f"lib{name}.so.{version.split('.')[0]}"
            command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{soname}", "-o", str(aside / soname)]
            subprocess.run(command, input=SYMBOLS, text=True, check=True)
        aside.rename(libraries)
    return {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")])}


def rtx() -> dict[str, str]:
    """Returns the environment in which a child process imports TensorRT for RTX, which is 96 MB of wheels."""
    if os.environ.get("VSTAR_RTX") != "1":
        pytest.skip("set VSTAR_RTX=1 to install the proprietary wheels of TensorRT for RTX (96 MB) into a scratch folder")
    folder = scratch.installed(f"tensorrt-rtx-{RTX}", f"tensorrt_rtx_cu13_bindings=={RTX}", f"tensorrt_rtx_cu13_libs=={RTX}")
    link = folder / "link" / "libtensorrt_rtx.so"
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        # the parser opens the name without a version when it meets a plugin
        link.symlink_to(folder / "tensorrt_rtx_libs" / "libtensorrt_rtx.so.1")
    return {"LD_LIBRARY_PATH": str(link.parent), "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")])}


class ChildDied(AssertionError):
    """A child process ended otherwise than well."""


def child(script: str, environment: dict[str, str], **request: Any) -> Any:
    """Runs a script of tests/ in a process of its own, which may die of what it loads; returns the JSON of its last line."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / script), json.dumps(request)],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise ChildDied(f"exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])

"""What a number belongs to: the device, its driver, library versions, and the commit."""

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from vstar_engine.kernels.cpu import library
from vstar_engine.machine import memory, threads

LIBRARIES = ("torch", "triton", "numpy", "xformers")
SYSTEM_CPUS = Path("/sys/devices/system/cpu/cpu0/cache")
# where the system does not say how large the last cache is: more than most have
CACHE_BYTES = 64 * 2**20
# rows that a measurement writes do not change what it measures
GENERATED = ":(top,exclude)bench/results"
# names the commit of a copy that git knows nothing of; a + behind it says that the copy was changed
COMMIT = "VSTAR_COMMIT"


def machine() -> dict[str, object]:
    """Names the machine, its libraries and the commit; None for what is not there. `load` is how busy it was before."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    return {
        "gpu": gpu and gpu.name,
        "gpu_memory": gpu and gpu.total_memory,
        "driver": driver and driver.splitlines()[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": threads.waiting(),
        "cpu_kernel": library.status()[0],
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        **commit(),
    }


def commit() -> dict[str, object]:
    """Returns the checkout's commit, whether it has changes, and the source: VSTAR_COMMIT, else git. None without either.

    Raises ValueError for a VSTAR_COMMIT that is no commit.
    """
    if given := os.environ.get(COMMIT):
        if not re.fullmatch(r"[0-9a-f]{40}\+?", given):
            raise ValueError(f"{COMMIT} takes 40 hexadecimal digits, and a + where the checkout was changed, got {given!r}")
        return {"commit": given[:40], "dirty": given.endswith("+"), "commit_from": COMMIT}
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ":/", GENERATED)
    return {"commit": head, "dirty": None if changes is None else bool(changes), "commit_from": head and "git"}


def _git(*words: str) -> str | None:
    return _said_by("git", "-C", str(Path(__file__).parent), *words)


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Returns the size of the device's last cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [size.read_text().strip() for size in SYSTEM_CPUS.glob("index*/size")] if SYSTEM_CPUS.is_dir() else []
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=CACHE_BYTES)


def free_bytes(device: torch.device) -> float:
    """Returns the memory a variant may take; without psutil a CPU's is not known, and then nothing limits it."""
    try:
        return memory.available_bytes(device)
    except ImportError:
        return float("inf")


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said_by(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

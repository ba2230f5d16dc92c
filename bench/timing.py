"""The one timer: interleaved rounds on the device's own clock, and a description of the machine they ran on."""

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Timing:
    """Seconds one call took: the middle of the rounds and the fifths around it."""

    median: float
    p20: float
    p80: float
    rounds: int


def mark() -> Mark:
    """Notes a moment on the GPU's clock in stream order, or on the host's where there is no GPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Waits for `end` and gives the seconds since `start`."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize() -> None:
    """Waits until the GPU, where there is one, has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, Timing]:
    """Times the variants in turn, round by round, so that a drift of the machine's clock meets all of them alike.

    The caller has checked that their results are right. `warmup` untimed rounds, in the same order, come first.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + rounds):
        for name, call in variants.items():
            synchronize()
            start = mark()
            call()
            taken = seconds_between(start, mark())
            if i >= warmup:
                seconds[name].append(taken)
    return {name: summarise(taken) for name, taken in seconds.items()}


def summarise(seconds: list[float]) -> Timing:
    """Reduces rounds to their median and 20th and 80th percentiles."""
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, p20, p80 = quantiles.tolist()
    return Timing(median, p20, p80, len(seconds))


def machine() -> dict[str, object]:
    """Names the device, the library versions and the commit that a number belongs to; None for what is not there."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    changes = _git("status", "--porcelain")
    return {
        "gpu": gpu and gpu.name,
        "gpu_memory": gpu and gpu.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


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


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""How many threads may compute here, and how idle ones wait. Used before PyTorch is imported: OpenMP reads its settings once.

OpenMP's idle threads spin by default, for milliseconds at each of thousands of barriers. Beside a busy neighbour they so spend
the time of the very thread that they wait for. Ours spin for some microseconds and then sleep: threads that sleep at once make
a video a fifth slower on quiet cores (`vstar-engine bench busy`).
"""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

log = logging.getLogger(__name__)

COUNT = "OMP_NUM_THREADS"
POLICY, PASSIVE = "OMP_WAIT_POLICY", "passive"
# GNU's runtime, which PyTorch's wheels carry, spins so often before it sleeps; others take the policy, and sleep at once.
# 300 spins are 8 microseconds on an AMD EPYC; Intel's spin is two to three times as long
SPINS, SPIN_COUNT = "GOMP_SPINCOUNT", "300"
# settings of OpenMP runtimes (any, GNU's, LLVM's and Intel's) that say how idle threads wait: one of them given is enough
WAITING = (POLICY, SPINS, "KMP_BLOCKTIME", "KMP_LIBRARY")
# of each kind of control group, the files that hold its quota and period in microseconds
QUOTA_V2, QUOTA_V1, PERIOD_V1 = "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"
ROOT = Path("/")

_warned: set[str] = set()


@dataclass(frozen=True)
class Cores:
    """The machine's cores, those that this process may run on, and the cores' worth of time that its control group has."""

    machine: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Returns how many threads have a core each, at least 1; a part of a core is none."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


def cores(root: Path = ROOT) -> Cores:
    """Counts the cores; `root` is where `proc` and `sys` lie."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else machine
    return Cores(machine, allowed, min(_quotas(root), default=None))


def environment(base: Mapping[str, str] | None = None, root: Path = ROOT) -> dict[str, str]:
    """Returns an environment (default: this process's) for a process that computes on the CPU. What it has already stays."""
    found = dict(os.environ if base is None else base)
    if not any(found.get(name) for name in WAITING):
        found |= {POLICY: PASSIVE, SPINS: SPIN_COUNT}
    here = cores(root)
    # OpenMP counts the cores that it may run on by itself, but knows of no quota
    if not found.get(COUNT) and here.usable < here.allowed:
        found[COUNT] = str(here.usable)
    return found


def prepare(root: Path = ROOT) -> None:
    """Sets what is not set yet in this process, for PyTorch that it imports later and for its children."""
    os.environ.update(environment(root=root))


def waiting() -> str | None:
    """Returns the settings that say how idle threads wait, as NAME=VALUE; None where OpenMP's default holds."""
    return " ".join(f"{name}={os.environ[name]}" for name in WAITING if os.environ.get(name)) or None


def spins() -> bool:
    """Returns whether idle threads wait by spinning, as far as the environment says."""
    found = (waiting() or "").casefold().split()
    return not found or f"{POLICY}=active".casefold() in found or "kmp_library=turnaround" in found


def warn(threads: int, root: Path = ROOT) -> None:
    """Warns, once a process, of what PyTorch's threads cost in a process that loaded it without our settings."""
    if threads < 2:
        return
    if waiting() is None:
        _warn_once(
            POLICY,
            f"idle threads spin here, which makes a video many times slower beside a busy process; before PyTorch is imported, "
            f'add: import os; os.environ.setdefault("{POLICY}", "{PASSIVE}")',
        )
    usable = cores(root).usable
    if threads > usable and not os.environ.get(COUNT):
        _warn_once(
            COUNT,
            f"PyTorch computes with {threads} threads where this process has the time of {usable} cores; "
            f"add: torch.set_num_threads({usable})",
        )


def _warn_once(about: str, sentence: str) -> None:
    if about not in _warned:
        _warned.add(about)
        log.warning("%s", sentence)


def _quotas(root: Path) -> Iterator[float]:
    """Yields the quota, in cores, of every control group that the process is in and of their ancestors."""
    for folder, top in _groups(root):
        for each in (folder, *folder.parents):
            if (quota := _quota(each)) is not None:
                yield quota
            if each == top:
                break


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yields the folder of each of the process's control groups that may limit its time, and where that kind is mounted."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mount, (kind, *_, options) = before.split(), after.split()
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        above, top = (PurePosixPath(_unescaped(name)) for name in mount[3:5])
        group, mounted = PurePosixPath(paths[kind]), root / top.relative_to("/")
        # in a container the mount begins at the container's own group; a path outside of it names a group that is not seen here
        inside = group.is_relative_to(above) and ".." not in group.parts
        yield mounted / group.relative_to(above) if inside else mounted, mounted


def _quota(group: Path) -> float | None:
    """Reads a group's quota in cores; None where it has none."""
    found = _word(group / QUOTA_V2).split() or [_word(group / QUOTA_V1), _word(group / PERIOD_V1)]
    try:
        quota, period = map(int, found)
    except ValueError:  # "max", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def _word(path: Path) -> str:
    return next(_lines(path), "")


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file; none where it cannot be read."""
    try:
        yield from path.read_text().splitlines()
    except OSError:
        return


def _unescaped(name: str) -> str:
    """Returns a name as it is, of which mountinfo writes spaces as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)

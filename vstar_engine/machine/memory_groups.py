"""What the process's control groups leave it of memory: its own group's limit and those above it, of versions 1 and 2."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
MOUNT = "sys/fs/cgroup"


@dataclass(frozen=True)
class Files:
    """How a version of control groups names its files: hard and soft limits, use, and the pages that the kernel gives back."""

    limits: tuple[str, ...]
    used: str
    given_back: str
    # of version 1, the lowest limit of the groups above, some of which a container does not see
    above: str | None = None


V2 = Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
V1 = Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "hierarchical_memory_limit")


def free_bytes(root: Path = ROOT) -> int | None:
    """Returns the bytes that the tightest of the groups has left, 0 where it is over; None where nothing limits them.

    Page cache that the kernel gives back when memory is short counts as free. The soft limit of version 1 is no limit: a group
    may pass it while the machine has memory, and container runtimes set it as a reservation below the limit.
    """
    return min((free for files, group in _groups(root) if (free := _free(files, group)) is not None), default=None)


def _groups(root: Path) -> Iterator[tuple[Files, Path]]:
    """Yields the groups of the process and all above it; where they are mounted is one, as a container sees its own."""
    places = [(V2, root / MOUNT, ""), (V1, root / MOUNT / "memory", "")]
    for line in _text(root / "proc/self/cgroup").split("\n"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path and not controllers:
            places += [(V2, root / MOUNT, path), (V2, root / MOUNT / "unified", path)]
        elif "memory" in controllers.split(","):
            places.append((V1, root / MOUNT / "memory", path))
    for files, mount, path in places:
        group = PurePosixPath(path.strip("/"))
        if ".." not in group.parts:
            yield from ((files, mount / each) for each in (group, *group.parents))


def _free(files: Files, group: Path) -> int | None:
    try:
        used = int(_text(group / files.used))
    except ValueError:
        return None
    stated = dict(line.split()[:2] for line in _text(group / "memory.stat").split("\n") if len(line.split()) >= 2)
    words = [_text(group / name).strip() for name in files.limits] + [stated.get(files.above or "", "")]
    limits = [int(word) for word in words if word.isdecimal()]  # not "max"
    given_back = stated.get(files.given_back, "0")
    used -= int(given_back) if given_back.isdecimal() else 0
    return max(0, min(limits) - max(0, used)) if limits else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

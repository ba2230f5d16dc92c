"""One hash of the kernels' sources: stored choices, timings and plugins are valid for these alone."""

import hashlib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

KERNELS = __package__

# a file's path below its package, and the file
Source = tuple[str, Traversable]


def modules(package: str) -> list[Source]:
    """Lists the Python files of a package and of the packages inside it."""
    return list(_below(files(package), package.rpartition(".")[2]))


def _below(folder: Traversable, name: str) -> Iterator[Source]:
    for entry in folder.iterdir():
        inside = f"{name}/{entry.name}"
        if entry.is_dir():
            yield from _below(entry, inside)
        elif entry.name.endswith(".py"):
            yield inside, entry


def hash_of(sources: Iterable[Source]) -> str:
    """Returns the sha256 of files and their paths, whatever their order."""
    digest = hashlib.sha256()
    for name, content in sorted((name, path.read_bytes()) for name, path in sources):
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()


def kernel_hash() -> str:
    """Returns the sha256 of the kernels' Python sources."""
    return hash_of(modules(KERNELS))

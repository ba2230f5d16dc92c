"""What the kernels are made of, as one hash: choices, timings and plugins are for the sources that they were made with."""

import hashlib
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable

KERNELS = __package__


def modules(package: str) -> list[Traversable]:
    """Gives the Python files of a package."""
    return [path for path in files(package).iterdir() if path.name.endswith(".py")]


def hash_of(sources: Iterable[Traversable]) -> str:
    """Gives the sha256 of files and their names, in whatever order they come."""
    digest = hashlib.sha256()
    for name, content in sorted((path.name, path.read_bytes()) for path in sources):
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()


def kernel_hash() -> str:
    """Names the kernels by the sha256 of the sources that define them and every way they run on a GPU."""
    return hash_of(modules(KERNELS))

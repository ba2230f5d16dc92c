"""What the kernels are made of, as one hash: engines and choices are for the sources that they were made with."""

import hashlib
from importlib.resources import files


def kernel_hash() -> str:
    """Names the kernels by the sha256 of the sources that define them and every way they run on a GPU."""
    digest = hashlib.sha256()
    sources = {path.name: path.read_bytes() for path in files(__package__).iterdir() if path.name.endswith(".py")}
    for name in sorted(sources):
        digest.update(name.encode())
        digest.update(sources[name])
    return digest.hexdigest()

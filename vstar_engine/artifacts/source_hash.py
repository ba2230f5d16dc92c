"""What built engines are made of beside their weights, as one hash: engines made of other sources are refused."""

from importlib.resources import files

from vstar_engine.kernels.source_hash import KERNELS, hash_of, modules

PACKAGE = "vstar_engine"
# hashed in full; of other rooms, what puts the networks together
ROOMS = (KERNELS, f"{PACKAGE}.networks", f"{PACKAGE}.export")
FILES = ("backends/eager.py", "config/models.py")


def engine_hash() -> str:
    """Names the kernels, the networks and what exports them by the sha256 of their sources."""
    single = [(name, files(PACKAGE).joinpath(name)) for name in FILES]
    return hash_of([*single, *(source for room in ROOMS for source in modules(room))])

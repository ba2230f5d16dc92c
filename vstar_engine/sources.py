"""What built engines are made of beside their weights, as one hash: engines made of other sources are refused."""

from importlib.resources import files

from vstar_engine.kernels.sources import KERNELS, hash_of, modules

# the networks and how they are put together; the exporters and the kernels are hashed in full
NETWORK = (
    "backends/eager.py",
    "config/models.py",
    "config/request.py",
    "config/sampling.py",
    "config/timeline.py",
    "layers.py",
    "spatial_attention.py",
    "step_cache.py",
    "text.py",
    "unet.py",
    "vae.py",
)


def engine_hash() -> str:
    """Names the kernels, the networks and what exports them by the sha256 of their sources."""
    network = [files(__package__).joinpath(name) for name in NETWORK]
    return hash_of([*modules(KERNELS), *network, *modules(f"{__package__}.export")])

"""Ways to run the denoiser. A backend is a module with `load`; it imports its library when it is chosen."""

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

# (latents (B, 4, T, H, W), timestep (B, 1 or T), context (B, 1 or T, 77, C), fps (B,), tar (1 or B, levels, T)) -> noise
Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

BACKENDS = {"eager": ".eager"}


def load_backend(name: str) -> Callable[..., Denoiser]:
    """Gives a backend's `load(spec, weights, *, device, dtype, spatial_attention)`; ValueError lists the known ones."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(BACKENDS)}")
    return import_module(BACKENDS[name], __name__).load

"""Text to long, dynamic video in one pass: an inference engine for VSTAR (arXiv 2403.13501)."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from vstar_engine.config.sampling import Sampling, Tar

    from .engine import Engine
    from .video import Video

__all__ = ["Engine", "Sampling", "Tar", "Video", "__version__"]

# in a bare checkout kernels/, export/ and bench/ lie beside the package; an installation maps them into it
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

_HOME = {"Engine": ".engine", "Video": ".video", "Sampling": ".config.sampling", "Tar": ".config.sampling"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)

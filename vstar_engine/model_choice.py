"""What is loaded, and where it runs: settled and checked before PyTorch is."""

from dataclasses import dataclass
from pathlib import Path

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.manifest import read_weights
from vstar_engine.config.models import model_named
from vstar_engine.weights import bundled

from .backends import EAGER, TENSORRT


@dataclass(frozen=True)
class Choice:
    """What is loaded: as asked for, else as the built engine says, else the defaults."""

    model: str = "videocrafter2"
    weights: str | Path | None = None
    backend: str = EAGER
    device: str = "cpu"
    dtype: str = "float32"

    @staticmethod
    def of(
        artifact: BuiltEngine | None,
        model: str | None,
        weights: str | Path | None,
        backend: str | None,
        device: str | None,
        dtype: str | None,
    ) -> "Choice":
        """Settles each setting; EngineError where one asked for is not the built engine's."""
        asked = {"model": model, "weights": weights, "backend": backend, "device": device, "dtype": dtype}
        given = {name: value for name, value in asked.items() if value is not None}
        if artifact is None:
            return Choice(**given)  # type: ignore[arg-type]
        other = {} if weights is None else {"weights_path": weights}
        artifact.check(other, **{name: given[name] for name in ("model", "backend", "dtype") if name in given})
        own = {name: artifact.identity[name] for name in ("model", "backend", "dtype")}
        own["device"] = "cpu" if artifact.identity["device"].startswith("cpu") else "cuda"
        return Choice(**{**own, "weights": artifact.manifest["weights_path"], **given})

    def check_weights(self) -> None:
        """Raises CheckpointError for weights that are damaged or another model's, by their hashes and manifest alone."""
        spec = model_named(self.model)
        path = Path(self.weights or bundled.weights(spec))
        bundled.check_model(read_weights(path), path, spec)


def check_options(artifact: BuiltEngine, spatial_attention: str, graphs: bool) -> None:
    """Raises ValueError for an option that changes nothing in a built engine."""
    if spatial_attention != "auto":
        said = f"{artifact.folder} attends within frames as it was built to, got spatial attention {spatial_attention!r}"
        raise ValueError(f"{said}; leave the option out, or run without a built engine")
    if not graphs and artifact.identity["backend"] not in TENSORRT:
        said = f"back end {artifact.identity['backend']} of {artifact.folder} records no CUDA graphs to do without"
        raise ValueError(f"{said}; leave out --no-graphs (graphs=False)")

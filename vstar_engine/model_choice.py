"""Which model is loaded, from where, and how it runs: settled and checked once, before PyTorch loads."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.artifacts.manifest import read_weights
from vstar_engine.config.models import Spec, model_named
from vstar_engine.config.sampling import FP8
from vstar_engine.weights import bundled, sources

from .backends import BACKENDS, EAGER, TENSORRT

# where the text tower comes from; the other place is None, nowhere
WEIGHTS = "weights"


@dataclass(frozen=True)
class ModelChoice:
    """The arguments of `Engine.load`, settled and checked; `Engine.load` describes them."""

    model: str = "videocrafter2"
    weights: str | Path | None = None
    backend: str = EAGER
    device: str = "cpu"
    dtype: str = "float32"
    spatial_attention: str = "auto"
    text: str | None = WEIGHTS
    engine: BuiltEngine | None = None
    loras: tuple[str, ...] = ()
    graphs: bool = True
    fp8: bool = False

    @staticmethod
    def of(engine: str | Path | BuiltEngine | None = None, **asked: Any) -> "ModelChoice":
        """Settles each setting: as asked for unless None, else as the built engine has it, else its default.

        Raises EngineError for a setting that differs from the built engine's, ValueError for one that makes no sense.
        """
        asked = {name: value for name, value in asked.items() if value is not None or name == "text"}
        if engine is None:
            if "model" not in asked and (model := sources.model_of(asked.get("weights"))):
                asked["model"] = model
            return ModelChoice(**asked)
        artifact = engine if isinstance(engine, BuiltEngine) else BuiltEngine.open(engine)
        own = {name: artifact.identity[name] for name in ("model", "backend", "dtype")}
        other = {"weights_path": asked["weights"]} if "weights" in asked else {}
        artifact.check(other, **{name: asked[name] for name in own if name in asked})
        own["device"] = "cpu" if artifact.identity["device"].startswith("cpu") else "cuda"
        own["weights"] = artifact.manifest["weights_path"]
        asked["loras"] = asked.get("loras") or tuple(artifact.manifest["loras"])
        return ModelChoice(**{**own, **asked, "engine": artifact})

    def __post_init__(self) -> None:
        model_named(self.model)
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; known backends: {', '.join(BACKENDS)}")
        if self.text not in (WEIGHTS, None):
            raise ValueError(f"text must be {WEIGHTS!r} or None, got {self.text!r}")
        if self.engine is None and self.backend != EAGER:
            raise ValueError(
                f"backend {self.backend} runs a built engine: make one with `vstar-engine build --backend {self.backend}` "
                "and give its folder as engine"
            )
        if self.engine is not None:
            self._check_built(self.engine)
        if self.spec.streaming is not None and (self.fp8 or self.loras or self.engine is not None):
            raise ValueError(f"model {self.model} runs in eager PyTorch alone, without LoRAs, {FP8} and built engines")
        if self.fp8 and self.text is None:
            raise ValueError(
                f"{FP8} is scaled by what a text does to the network, so it needs the text tower and states, not embeddings"
            )

    def _check_built(self, engine: BuiltEngine) -> None:
        """Raises ValueError for an option that changes nothing in a built engine."""
        if self.spatial_attention != "auto":
            said = f"{engine.folder} attends within frames as it was built to, got spatial attention {self.spatial_attention!r}"
            raise ValueError(f"{said}; leave the option out, or run without a built engine")
        if not self.graphs and self.backend not in TENSORRT:
            said = f"back end {self.backend} of {engine.folder} records no CUDA graphs to do without"
            raise ValueError(f"{said}; leave out --no-graphs (graphs=False)")
        if self.fp8:
            raise ValueError(f"{FP8} converts the network in eager PyTorch, and {engine.folder} computes as it was built")

    @cached_property
    def spec(self) -> Spec:
        """The model, with the networks that its weights state, where they are on this machine."""
        there = self.weights
        if sources.hub_id(self.weights, self.model) is not None:
            there = sources.present(self.weights, self.model, self.dtype)
        return bundled.stated_spec(model_named(self.model), there)

    def located(self, ask: sources.Ask | None = None, on_progress: sources.OnProgress | None = None) -> "ModelChoice":
        """Returns the choice with its weights as a folder or file that is loaded, downloaded and converted where they must be.

        Without `weights` only what was pulled before is found. Raises as `sources.obtain` does.
        """
        if self.weights is None and self.model in bundled.BUNDLED:
            return self
        folder = sources.present(self.weights, self.model, self.dtype)
        if folder is None and self.weights is None and ask is None:
            bundled.weights(self.spec)
        kept = sources.kept_dtypes(self.dtype)[0]
        return replace(self, weights=folder or sources.obtain(self.weights, self.model, kept, ask, on_progress))

    def check_weights(self) -> None:
        """Raises CheckpointError for weights that are damaged or another model's, by their hashes and manifest alone."""
        path = Path(self.weights or bundled.weights(self.spec))
        bundled.check_model(read_weights(path), path, self.spec)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `Engine.load` as plain values, for another process."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        plain["weights"] = None if self.weights is None else str(self.weights)
        return {**plain, "engine": None if self.engine is None else str(self.engine.folder), "loras": list(self.loras)}

"""One golden case: its arrays, and the errors of our outputs against the stored ones."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vstar_engine.weights import checkpoint

from .golden import Case, Golden

NO_PROBE, STRICTEST, LOOSEST = 1e-5, 1e-5, 1e-4
PROBE_FACTOR = 20


@dataclass(frozen=True)
class Finding:
    """The relative error and the tolerance of one output."""

    output: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def relative_error(ours: Any, golden: Any) -> float:
    """||ours - golden|| / ||golden|| in float64; the absolute norm where golden is zero, infinity for another shape."""
    ours = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    ours, golden = ours.astype(np.float64), np.asarray(golden).astype(np.float64)
    if ours.shape != golden.shape:
        return math.inf
    return float(np.linalg.norm(ours - golden) / (np.linalg.norm(golden) or 1.0))


def tolerance(case: Case, output: str) -> float:
    """Returns the case's own tolerance, else min(1e-4, max(1e-5, 20 x its rounding probe)), else 1e-5."""
    own = case.get("tolerance", {}).get(output)
    if own is not None:
        return own
    probe = case.get("rounding_probe")
    if not probe:
        return NO_PROBE
    if "rel_l2" not in probe:
        probe = probe.get(output) or max(probe.values(), key=lambda p: p["rel_l2"])
    return min(LOOSEST, max(STRICTEST, PROBE_FACTOR * probe["rel_l2"]))


class Judge:
    """Runs one case on one device; collects `findings` of its outputs, and of `inputs` that were generated again."""

    def __init__(self, golden: Golden, case: Case, device: torch.device):
        self.golden, self.case, self.device = golden, case, device
        self.arrays = golden.inputs(case)
        self.findings: list[Finding] = []
        self.inputs: list[Finding] = []

    def stores(self, *outputs: str) -> bool:
        """Returns whether the case stores any of these outputs."""
        return any(output in self.arrays for output in outputs)

    def array(self, name: str) -> np.ndarray:
        """Returns an input array; ValueError where the case does not store it."""
        if name not in self.arrays:
            raise ValueError(f"the case stores no {name}, which its outputs are computed from")
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        return torch.as_tensor(self.array(name)).to(self.device)

    def filled(self, module: nn.Module) -> Any:
        checkpoint.load(module, self.golden.weights(self.case), device=self.device)
        return module.eval()

    def places(self, name: str, stored: int, length: int) -> list[int]:
        """Returns the rows or frames, of `length`, that an output stores: those in array `name` if it has `stored` entries."""
        if name not in self.arrays or self.arrays[name].size != stored:
            return list(range(length))
        named = self.arrays[name].astype(int).ravel().tolist()
        if not all(place in range(length) for place in named):
            raise ValueError(f"{name} must lie within 0 to {length - 1}, got {named}")
        return named

    def compare(self, ours: Any, output: str, limit: float | None = None, golden: Any = None, **named: int) -> None:
        """Judges an output that the case stores; `named` maps an array of stored indices to its axis."""
        if output not in self.arrays:
            return
        golden = self.arrays[output] if golden is None else golden
        for name, axis in named.items():
            if golden.ndim == ours.ndim:
                places = self.places(name, golden.shape[axis], ours.shape[axis])
                ours = ours.index_select(axis, torch.tensor(places, device=ours.device))
        error = relative_error(ours, golden)
        self.findings.append(Finding(output, error, tolerance(self.case, output) if limit is None else limit))

    def exact(self, ours: Any, output: str, golden: Any = None) -> None:
        """Judges integers that the case stores: they must be equal."""
        if output in self.arrays:
            self.findings.append(self._equal(ours, output, self.arrays[output] if golden is None else golden))

    def check_input(self, ours: Any, name: str) -> None:
        """Judges the first values of a generated input against the stored ones."""
        if name in self.arrays:
            self.inputs.append(self._equal(ours, name, self.arrays[name]))

    @staticmethod
    def _equal(ours: Any, name: str, golden: Any) -> Finding:
        return Finding(name, 0.0 if np.array_equal(ours, golden) else math.inf, 0.0)

"""Reader for folders of golden cases: a manifest, safetensors files, and inputs or weights that a generator makes again."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vstar_engine.artifacts.files import sha256

Case = dict[str, Any]
_MASK, _GAMMA = (1 << 64) - 1, 0x9E3779B97F4A7C15


def normalish(seed: int, name: str, shape: list[int], std: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """Generates bit-exact float32 values of a mean and deviation: four summed 16-bit quarters of splitmix64 words.

    The stream starts from the seed and the name's FNV-1a hash.
    """
    hashed = 0xCBF29CE484222325
    for byte in name.encode():
        hashed = ((hashed ^ byte) * 0x100000001B3) & _MASK
    count = int(np.prod(shape)) if shape else 1
    with np.errstate(over="ignore"):
        word = np.uint64((seed * _GAMMA + hashed) & _MASK) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word = word ^ (word >> np.uint64(31))
    quarters = np.zeros(count, dtype=np.int64)
    for shift in (0, 16, 32, 48):
        quarters += ((word >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    unit = (quarters - 131070).astype(np.float64) / float(np.sqrt((65536.0**2 - 1.0) / 3.0))
    return (mean + std * unit).astype(np.float32).reshape(shape)


def _is_case(case: object) -> bool:
    return isinstance(case, dict) and all(isinstance(case.get(name), str) for name in ("name", "kind", "file", "sha256"))


class Golden:
    """A folder of golden cases. Raises ValueError when the folder or its manifest cannot be read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text())
            self.cases: list[Case] = self.manifest["cases"]
        except FileNotFoundError as error:
            raise ValueError(f"{self.folder} is not a golden folder: it has no manifest.json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'manifest.json'} is no golden manifest ({error})") from error
        if not isinstance(self.cases, list) or not all(map(_is_case, self.cases)):
            raise ValueError(
                f"{self.folder / 'manifest.json'} is no golden manifest (a case has a name, kind, file and sha256)"
            )
        self._by_name = {case["name"]: case for case in self.cases}

    def case(self, name: str) -> Case:
        if name not in self._by_name:
            raise ValueError(f"{self.folder} has no case {name!r}")
        return self._by_name[name]

    def damaged(self, case: Case) -> str | None:
        """Returns a sentence where a file of the case is missing or differs from the manifest, else None."""
        for name in filter(None, (case["name"], case.get("weights"))):
            entry = self.case(name)
            path = self.folder / entry["file"]
            if not path.is_file():
                return f"{entry['file']} is missing"
            if sha256(path) != entry["sha256"]:
                return f"{entry['file']} has another sha256 than the manifest says"
        return None

    @cache  # noqa: B019 - a golden folder lives as long as its reader
    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Returns a case's stored tensors; float16 ones are exact inputs, widened to float32."""
        try:
            stored = load_file(self.folder / self.case(name)["file"])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.case(name)['file']} is no safetensors file ({error})") from error
        return {key: value.astype(np.float32) if value.dtype == np.float16 else value for key, value in stored.items()}

    def inputs(self, case: Case) -> dict[str, np.ndarray]:
        """Returns the case's tensors together with its generated inputs."""
        generated = (case.get("generated_inputs") or {}).items()
        made = {key: normalish(g["seed"], g["name"], g["shape"], g["std"], g["mean"]) for key, g in generated}
        return {**self.tensors(case["name"]), **made}

    def weights(self, case: Case) -> Mapping[str, np.ndarray]:
        """Returns the case's weights under official names: from a weights case, generated, or stored under `w.`."""
        if case.get("weights"):
            prefix = case.get("weights_prefix", "")
            stored = self.tensors(case["weights"])
            return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        generated = case.get("generated_weights")
        if isinstance(generated, str):
            generated = self.case(generated.split("same as ")[1])["generated_weights"]
        if generated:
            table, prefix, seed = generated["table"], generated["name_prefix"], generated["seed"]
            made = {name: normalish(seed, prefix + name, shape, std, mean) for name, shape, mean, std in table}
            hashed = hashlib.sha256()
            for value in made.values():
                hashed.update(value.tobytes())
            if hashed.hexdigest() != generated["sha256_of_concatenated_fp32"]:
                raise ValueError(f"the weights generated for {case['name']} are not the ones the manifest describes")
            return made
        return {name[2:]: value for name, value in self.tensors(case["name"]).items() if name.startswith("w.")}

    def config(self, case: Case, key: str) -> Any:
        """Returns an architecture from the case, else from its weights' case."""
        if key in case:
            return case[key]
        return self.case(case["weights"])["config"][key]

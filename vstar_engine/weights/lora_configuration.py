"""How a LoRA's changes are scaled: what its metadata or the configuration beside it says of alpha."""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vstar_engine.errors import CheckpointError

log = logging.getLogger(__name__)

# where diffusers keeps a LoRA's configuration in a file's metadata, as JSON: {"unet.r": 8, "unet.lora_alpha": 16, ...}
CONFIGURATION = "lora_adapter_metadata"
# PEFT's, beside adapter_model.safetensors
BESIDE, PEFT_STEM = "adapter_config.json", "adapter_model"
# other trainers' names for the alpha of all layers in a file's metadata, kohya's last
ALPHAS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
# parts of a text tower, which stays as it is
TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoder(_\d)?\.|text_model\.)")
UNREAD = {
    "alpha_pattern": "save it with an alpha tensor a layer",
    "use_dora": "save it as a plain LoRA",
    "fan_in_fan_out": "save it with matrices of (out, in)",
}


@dataclass(frozen=True)
class Configuration:
    """The alpha of layers without one of their own, whether it goes by the rank's root (arXiv 2312.03732), and who says so."""

    alpha: float | None = None
    rooted: bool = False
    said_by: str = "its metadata"

    def metadata(self) -> dict[str, str]:
        """Returns what a file's metadata says of it, for a file that leaves its folder."""
        told = {"lora_alpha": self.alpha, "use_rslora": self.rooted}
        return {CONFIGURATION: json.dumps({key: value for key, value in told.items() if value is not None})}

    def scale(self, path: Path, layer: str, rank: int, own: float | None) -> float:
        """Returns alpha / rank (or its root) of a layer; 1 where nothing says an alpha."""
        alpha = self.alpha if own is None else own
        if self.rooted and alpha is None:
            raise CheckpointError(
                f"{path}: {self.said_by} sets use_rslora, which divides alpha by the rank's root, and layer {layer} has no "
                f"alpha: save it with lora_alpha in {CONFIGURATION} or with an alpha tensor a layer"
            )
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.rooted else rank)


def configuration_of(path: Path, metadata: Mapping[str, str]) -> Configuration:
    """Reads a LoRA's configuration: from its metadata, else from PEFT's file beside it."""
    if CONFIGURATION in metadata:
        said_by = "its metadata"
        try:
            whole = json.loads(metadata[CONFIGURATION])
            told = {key.rpartition(".")[2]: value for key, value in whole.items() if not TEXT.match(key)}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: {said_by} is no configuration of a LoRA ({error})") from error
        return _read(path, told, said_by)
    alphas = [metadata[key] for key in ALPHAS if metadata.get(key) not in (None, "", "None", "null")]
    if alphas:
        # kohya's 0 means the rank
        return _read(path, {"lora_alpha": alphas[0] if float_or_none(alphas[0]) != 0 else None}, "its metadata")
    return _beside(path)


def float_or_none(text: Any) -> float | None:
    """Returns a number, or None for what is no number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _beside(path: Path) -> Configuration:
    beside = path.parent / BESIDE
    if not beside.is_file():
        return Configuration()
    others = [file for file in path.parent.iterdir() if file.suffix.lower() in (".safetensors", ".bin") and file != path]
    if path.stem != PEFT_STEM and others:
        log.warning("%s: %s beside it is not read, since it may be another file's (%s)", path, BESIDE, others[0].name)
        return Configuration()
    said_by = f"{BESIDE} beside it"
    try:
        told = json.loads(beside.read_text("utf-8-sig"))
        kind = str(told.get("peft_type", "LORA")).upper()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {said_by} is no configuration of a LoRA ({error})") from error
    if kind != "LORA":
        raise CheckpointError(f"{path}: {said_by} says peft_type {kind}, where only LORA is read")
    return _read(path, told, said_by)


def _read(path: Path, told: Mapping[str, Any], said_by: str) -> Configuration:
    alpha = None
    if told.get("lora_alpha") is not None:
        alpha = float_or_none(told["lora_alpha"])
        if alpha is None or isinstance(told["lora_alpha"], bool):
            raise CheckpointError(
                f"{path}: {said_by} is no configuration of a LoRA (lora_alpha must be a number, got {told['lora_alpha']!r})"
            )
        if not math.isfinite(alpha):
            raise CheckpointError(f"{path}: {said_by} is no configuration of a LoRA (lora_alpha is {alpha})")
    unread = [key for key in UNREAD if told.get(key)]
    if unread:
        raise CheckpointError(f"{path}: {said_by} sets {', '.join(unread)}, which is not read: {UNREAD[unread[0]]}")
    return Configuration(alpha, bool(told.get("use_rslora")), said_by)

"""Weights in the official key naming: the table official -> ours and a strict, streaming loader."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vstar_engine.config.models import Spec, TextSpec, UNetSpec, VaeSpec

from . import schedule
from .artifacts import digest_of, open_tensors, read_weights, sha256
from .errors import CheckpointError
from .text import TextTower
from .unet import UNet
from .vae import Vae

log = logging.getLogger(__name__)

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."

# our part of a name -> the official parts whose tensors it holds, stacked along the first axis
TABLE = {
    "temporal_conv": ("temopral_conv",),
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
}
# mapped pages stay resident while a file is open, so all are closed after this much
REOPEN_BYTES = 256 * 2**20


def official_names(name: str) -> list[str]:
    """Gives the official names whose tensors make up our parameter `name`."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in TABLE:
            return [".".join([*parts[:i], official, *parts[i + 1 :]]) for official in TABLE[part]]
    return [name]


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Lists the official names and shapes of a module's parameters."""
    shapes = {}
    for name, parameter in module.named_parameters():
        names = official_names(name)
        for official in names:
            shapes[official] = (parameter.shape[0] // len(names), *parameter.shape[1:])
    return shapes


def official_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Lists every key and shape of a model's official checkpoint (2039 for VideoCrafter2)."""
    with torch.device("meta"):
        unet, vae, text = UNet(spec.unet), Vae(spec.vae), TextTower(spec.text)
    first, last = "transformer.resblocks.0.", f"transformer.resblocks.{spec.text.layers - 1}."
    tower = module_shapes(text)
    tower |= {last + name.removeprefix(first): shape for name, shape in tower.items() if name.startswith(first)}
    tower |= {"text_projection": (spec.text.width, spec.text.width), "logit_scale": ()}
    shapes: dict[str, tuple[int, ...]] = {name: values.shape for name, values in schedule.buffers().items()}
    for prefix, part in ((UNET, module_shapes(unet)), (VAE, module_shapes(vae)), (TEXT, tower)):
        shapes |= {prefix + name: shape for name, shape in part.items()}
    return shapes


class Weights(Mapping[str, Tensor]):
    """The tensors of a converted folder or of one safetensors file, mapped from disk as they are asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_weights(self.path)
        files = [self.path / entry["name"] for entry in self.manifest.get("files", ())] or [self.path]
        self._open: dict[Path, Any] = {}
        self._read = 0
        self._where = {name: file for file in files for name in self._file(file).offset_keys()}

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_tensors(path, "pt")
        return self._open[path]

    def __getitem__(self, name: str) -> Tensor:
        if self._read > REOPEN_BYTES:
            self._open.clear()
            self._read = 0
        tensor = self._file(self._where[name]).get_tensor(name)
        self._read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def fingerprint(self) -> str:
        """Names the tensors by a hash of their files', which a folder's manifest states and was held to."""
        files = [(entry["name"], entry["sha256"]) for entry in self.manifest.get("files", ())]
        return digest_of(sorted(files)) if files else sha256(self.path)


def listing(names: list[str]) -> str:
    """Names the first few of many, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_keys(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises CheckpointError unless names and shapes agree exactly."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing or unknown:
        parts = [f"{len(missing)} tensors are missing ({listing(missing)})"] if missing else []
        parts += [f"{len(unknown)} are unknown ({listing(unknown)})"] if unknown else []
        raise CheckpointError(f"{where} does not fit this network: {'; '.join(parts)}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(f"{where} does not fit this network: {name} is {tuple(found[name])}, wanted {tuple(shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for NaN or infinity."""
    extremes = torch.stack(torch.aminmax(tensor))  # passes NaN on; one quick reading where isfinite takes several
    if not torch.isfinite(extremes).all():
        raise CheckpointError(f"{name} holds NaN or infinite values in {tensor.dtype}; every weight must be finite")


def load(
    module: nn.Module,
    source: str | Path | Mapping[str, Any],
    prefix: str = "",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Fills every parameter of UNet, Vae, TextTower or one of their blocks, one at a time, convolutions channels-last.

    source: a path (converted folder, safetensors file) or a mapping of official names to tensors or arrays; only names under
    `prefix` count. The module may lie on the meta device. Returns the official names that this module does not need.
    Raises CheckpointError for a missing, unknown, misshapen or non-finite tensor.
    """
    tensors = source if isinstance(source, Mapping) else Weights(source)
    where = f"the mapping under {prefix!r}" if isinstance(source, Mapping) else str(source)
    unused = check(module, tensors, prefix, where)
    wanted = module_shapes(module)
    for name, parameter in list(module.named_parameters()):
        shapes = [wanted[official] for official in official_names(name)]
        _place(module, name, parameter, _parts(tensors, prefix, name, shapes, where), device, dtype)
    return unused


def check(module: nn.Module, tensors: Mapping[str, Any], prefix: str = "", where: str = "") -> list[str]:
    """Gives the official names that a module does not need; CheckpointError where one is missing or unknown."""
    where = where or f"the mapping under {prefix!r}"
    wanted = {prefix + name: shape for name, shape in module_shapes(module).items()}
    unneeded = tuple(prefix + name for name in getattr(module, "unused", ()))
    here = [name for name in tensors if name.startswith(prefix)]
    unused = [name for name in here if name not in wanted and name.startswith(unneeded or ("\0",))]
    unknown = [name for name in here if name not in wanted and name not in set(unused)]
    missing = [name for name in wanted if name not in set(here)]
    if missing or unknown:
        check_keys(dict.fromkeys([*wanted.keys() - set(missing), *unknown], ()), wanted, where)
    return unused


def _parts(tensors: Mapping[str, Any], prefix: str, name: str, shapes: list[tuple[int, ...]], where: str) -> list[Tensor]:
    """Reads the official tensors that make up our parameter `name` and holds them to their shapes."""
    officials = [prefix + official for official in official_names(name)]
    parts = [torch.as_tensor(tensors[official]) for official in officials]
    for official, part, shape in zip(officials, parts, shapes, strict=True):
        check_keys({official: tuple(part.shape)}, {official: shape}, where)
    return parts


def parameter(tensors: Mapping[str, Any], prefix: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reads one parameter of ours in `dtype`, contiguous; `shape` may lack trailing ones. CheckpointError as in `load`."""
    officials = [torch.as_tensor(tensors[prefix + official]).to(dtype) for official in official_names(name)]
    whole = torch.cat(officials) if len(officials) > 1 else officials[0]
    if (*shape, *[1] * (whole.dim() - len(shape))) != tuple(whole.shape):
        check_keys({name: tuple(whole.shape)}, {name: shape}, f"the mapping under {prefix!r}")
    check_finite(name, whole)
    return whole.reshape(shape).contiguous()


def memory_format(dims: int) -> torch.memory_format:
    """Gives the layout that parameters of so many dimensions are held in: convolutions' channels-last."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dims, torch.contiguous_format)


def _place(
    module: nn.Module,
    name: str,
    old: nn.Parameter,
    parts: list[Tensor],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    where = torch.device("cpu") if device is None and old.is_meta else (device or old.device)
    new = torch.empty(old.shape, dtype=dtype or old.dtype, device=where, memory_format=memory_format(old.dim()))
    rows = old.shape[0] // len(parts) if old.dim() else 1
    for i, part in enumerate(parts):
        new[i * rows : (i + 1) * rows].copy_(part)
    check_finite(name, new)
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(new, requires_grad=old.requires_grad))


def text_hash(tensors: Mapping[str, Tensor], spec: TextSpec) -> str | None:
    """Names a text tower by the sha256 of its weights rounded to float16, however they are stored; None where it is absent."""
    with torch.device("meta"):
        names = [TEXT + name for name in sorted(module_shapes(TextTower(spec)))]
    if not all(name in tensors for name in names):
        return None
    digest = hashlib.sha256()
    for name in names:
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.float16).contiguous().numpy().data)
    return digest.hexdigest()


_UNET_FIXED = {
    "temporal_attention": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "resblock_updown": False,
    "use_scale_shift_norm": False,
    "conv_resample": True,
    "dims": 2,
}
_UNET_IRRELEVANT = {"use_checkpoint", "temporal_length", "dropout", "use_image_attention", "use_fp16"}
_VAE_IRRELEVANT = {"resolution", "dropout", "double_z"}


def spec_from_official(params: Mapping[str, Any]) -> Any:
    """Reads official configuration names: a UNet's give a UNetSpec, a first stage's ddconfig (with `embed_dim` and
    `scale_factor` if known) a VaeSpec, an OpenCLIP text configuration a TextSpec.

    Raises ValueError for a setting this network does not have, so that nothing is ignored in silence.
    """
    given = dict(params)
    if "model_channels" in given:
        return _unet_spec(given)
    if "ch_mult" in given:
        return _vae_spec(given)
    if "vocab_size" in given:
        return TextSpec(**{name: given[name] for name in ("width", "heads", "layers", "vocab_size", "context_length")})
    raise ValueError(f"neither a UNet's, an autoencoder's nor a text tower's configuration: {', '.join(given)}")


def _unet_spec(given: dict[str, Any]) -> UNetSpec:
    for name, value in _UNET_FIXED.items():
        got = given.pop(name, value)
        if got != value:
            raise ValueError(f"the UNet configuration needs {name} = {value}, got {got}")
    mult = tuple(given.pop("channel_mult"))
    factors = set(given.pop("attention_resolutions"))
    spec = UNetSpec(
        model_channels=given.pop("model_channels"),
        channel_mult=mult,
        num_res_blocks=given.pop("num_res_blocks"),
        attention_levels=tuple(i for i in range(len(mult)) if 2**i in factors),
        head_dim=given.pop("num_head_channels"),
        context_dim=given.pop("context_dim"),
        transformer_depth=given.pop("transformer_depth", 1),
        in_channels=given.pop("in_channels"),
        out_channels=given.pop("out_channels"),
        use_linear=given.pop("use_linear", False),
        temporal_conv=given.pop("temporal_conv", False),
        init_attention=given.pop("addition_attention", False),
        fps_condition=given.pop("fps_cond", False),
    )
    _refuse_rest(given, _UNET_IRRELEVANT)
    return spec


def _vae_spec(given: dict[str, Any]) -> VaeSpec:
    if given.pop("attn_resolutions", []):
        raise ValueError("the autoencoder configuration needs attn_resolutions = []")
    spec = VaeSpec(
        channels=given.pop("ch"),
        channel_mult=tuple(given.pop("ch_mult")),
        num_res_blocks=given.pop("num_res_blocks"),
        z_channels=given["z_channels"],
        embed_dim=given.pop("embed_dim", given["z_channels"]),
        in_channels=given.pop("in_channels", 3),
        out_channels=given.pop("out_ch", 3),
        scale_factor=given.pop("scale_factor", VaeSpec.scale_factor),
    )
    _refuse_rest(given, _VAE_IRRELEVANT | {"z_channels"})
    return spec


def _refuse_rest(given: dict[str, Any], irrelevant: set[str]) -> None:
    unknown = sorted(given.keys() - irrelevant)
    if unknown:
        raise ValueError(f"unknown settings in the official configuration: {', '.join(unknown)}")

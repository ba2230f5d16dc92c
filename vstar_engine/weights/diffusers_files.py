"""Which files of a diffusers folder hold the weights of a part: one or several, of full or half precision."""

import json
from pathlib import Path

from vstar_engine.artifacts.files import digest_of, sha256
from vstar_engine.artifacts.text_file import read_text
from vstar_engine.errors import CheckpointError

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
UNET, VAE, TEXT, TOKENIZER, SCHEDULE = PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# what the weights of a part are called: safetensors, and pickles
STEMS = {
    UNET: ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    VAE: ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    TEXT: ("model", "pytorch_model"),
}
TOKENIZER_FILES = TOKENIZER_CONFIG, SPECIAL_TOKENS, WHOLE_TOKENIZER, VOCABULARY, MERGES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)
HALF = "fp16"


def candidates(part: str) -> list[tuple[str, str]]:
    """Returns (file, index of several) that may hold a part, the preferred first: exact before half, safe before pickled."""
    safe, pickled = STEMS[part]
    found = []
    for variant in ("", f".{HALF}"):
        for stem, ending in ((safe, "safetensors"), (pickled, "bin")):
            found.append((f"{stem}{variant}.{ending}", f"{stem}.{ending}.index{variant}.json"))
    return found


def weight_files(folder: Path, part: str) -> list[Path]:
    """Returns the files that hold a part's weights in a folder; CheckpointError where there are none."""
    for single, index in candidates(part):
        if (folder / single).is_symlink() and not (folder / single).exists():
            raise CheckpointError(f"{folder / single} is a link to a file that is not there: its download has not finished")
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return shards(folder / index)
    wanted = ", ".join(single for single, _ in candidates(part))
    there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "nothing"
    raise CheckpointError(f"{folder} holds no weights: one of {wanted}, or an index of several, is wanted; it holds {there}")


def shards(index: Path, there: bool = True) -> list[Path]:
    """Returns the files that an index names, which must be beside it where `there`; CheckpointError for another."""
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of weights in several files ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is no file beside it")
        if there and not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, though {index.name} names it")
    return [index.parent / name for name in names]


def is_pipeline(path: Path) -> bool:
    """Returns whether a folder is a whole pipeline of diffusers."""
    return (path / INDEX).is_file()


def is_layout(path: Path) -> bool:
    """Returns whether a folder is one of diffusers': a pipeline's, or a UNet's alone."""
    if is_pipeline(path):
        return True
    return (path / CONFIG).is_file() and '"UNet3D' in (path / CONFIG).read_text(errors="replace")


def used_files(folder: Path) -> list[Path]:
    """Returns every file of a diffusers folder that is read, weights and configurations, sorted."""
    if not is_pipeline(folder):
        return sorted([folder / CONFIG, *weight_files(folder, UNET)])
    found = [folder / INDEX, folder / SCHEDULE / SCHEDULER]
    for part in STEMS:
        found += [folder / part / CONFIG, *weight_files(folder / part, part)]
    found += [path for name in TOKENIZER_FILES if (path := folder / TOKENIZER / name).is_file()]
    return sorted(found)


def sha256_of(source: Path, read: list[Path]) -> str:
    """Returns the sha256 of a file, or of the names and sums of a folder's files that are read."""
    if read == [source]:
        return sha256(source)
    return digest_of([[str(path.relative_to(source)), sha256(path)] for path in read])

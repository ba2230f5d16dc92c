"""The process that reads a pickled LoRA: it is watched, and runs no code of the file."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from vstar_engine.config import models
from vstar_engine.errors import OutputError

from .lora import Lora
from .lora_configuration import configuration_of
from .pickle_file import read_pickle
from .turbo_lora import named
from .watched_child import reporting
from .wrappers import state_dict_in


def convert_here(source: Path, out: Path, model: str, guidance: float) -> None:
    """Writes the matrices of a dictionary under their own names, those of a bare list under the names of their layers."""
    spec = models.model_named(model).unet
    content = read_pickle(source)
    about = {"source": source.name}
    if isinstance(content, list):
        tensors = named(content, spec, guidance, str(source))
        about["embedded_guidance"] = f"{guidance:g}"
    else:
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state_dict_in(content, str(source)).items()}
        configured = configuration_of(source, {})
        if configured.alpha is not None or configured.rooted:
            about |= configured.metadata()
        Lora.of(source, dict(tensors), about, spec)
    try:
        save_file(tensors, out, about)
    except SafetensorError as error:
        raise OutputError(f"cannot write {out.name}: {error}") from error


if __name__ == "__main__":
    with reporting() as (given, _):
        convert_here(Path(given.pop("source")), Path(given.pop("out")), **given)

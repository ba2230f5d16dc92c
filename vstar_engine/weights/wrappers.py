"""What trainers put around a state dict: dictionaries that hold it, and words before or inside its names."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from vstar_engine.errors import CheckpointError

from .key_map import TEXT, UNET, VAE

log = logging.getLogger(__name__)

# where a state dict lies in a larger file: Lightning's, DeepSpeed's, and what plain training loops write
CONTAINERS = ("state_dict", "module", "model_state_dict", "model", "net", "weights", "params")
# parts of names that torch.compile, DistributedDataParallel, DeepSpeed, FSDP and activation checkpointing add
WRAPPERS = frozenset({"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# a moving average that was saved beside the weights, its names flattened
AVERAGES = ("model_ema.", "ema_model.", "ema.")


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names, read when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], stored: Mapping[str, str]):
        self.tensors, self.stored = tensors, stored

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def without_wrappers(name: str) -> str:
    """Takes the words of wrappers out of a name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def stored_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Returns official name -> name in the file, without wrappers and without an average that lies beside the weights."""
    found: dict[str, str] = {}
    averaged = 0
    for stored in names:
        name = without_wrappers(stored)
        if name.startswith(AVERAGES):
            averaged += 1
            continue
        if name in found:
            raise CheckpointError(f"{where} holds {name} twice, as {found[name]} and as {stored}; leave one of them in")
        found[name] = stored
    if averaged and found:
        log.warning(
            "%s also holds a moving average of its weights (EMA, %d tensors): the weights are taken, not it", where, averaged
        )
    prefix = _common_prefix(found)
    return {name.removeprefix(prefix): stored for name, stored in found.items()}


def _common_prefix(names: Iterable[str]) -> str:
    """Returns what stands before the official name of every tensor of the UNet, the autoencoder and the text tower."""
    before = {name.partition(part)[0] for name in names for part in (UNET, VAE, TEXT) if part in name}
    return before.pop() if len(before) == 1 else ""


def state_dict_in(content: Any, where: str, hint: str = "") -> dict[str, Tensor]:
    """Takes the tensors out of a Lightning file, a {"module": ...} file or a bare state dict."""
    while isinstance(content, Mapping):
        held = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        if not held:
            break
        averages = [str(name) for name, value in content.items() if "ema" in str(name).lower() and isinstance(value, Mapping)]
        if averages:
            log.warning("%s also holds %s: %s is taken, not it", where, averages[0], held[0])
        beside = [str(name) for name in content if name != held[0] and str(name) not in averages]
        if beside:
            log.warning("%s also holds %s, which stay unread", where, ", ".join(beside))
        content = content[held[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{where} holds no state dict but {type(content).__name__}{hint}")
    stray = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if stray:
        raise CheckpointError(f"{where} holds entries that are no tensors, such as {stray[0]}")
    return {str(name): value for name, value in content.items()}

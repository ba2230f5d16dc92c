"""The ops of one UNet forward: where each stands, its FLOPs and bytes, and its floor on a machine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from vstar_engine.bench.harness.random_networks import GUIDANCE_BRANCHES, lay_out, step_inputs
from vstar_engine.config.models import Spec
from vstar_engine.machine.memory import without_data
from vstar_engine.networks.unet import UNet

PRODUCTS = {
    "ff": "feed-forward",
    "attn1": "projections",
    "attn2": "projections",
    "proj_in": "projections",
    "proj_out": "projections",
}
# tensor cores multiply e4m3 at twice the rate of half precision
SPEED = {"scaled_mm": 2, "conv_e4m3": 2, "linear_e4m3": 2}
COPIES = ("cat", "clone", "copy", "repeat", "upsample")


@dataclass(frozen=True)
class Machine:
    """What a machine can do at most: matrix products in FLOP/s at the run's dtype, memory traffic in bytes/s."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Op:
    """One operator of the forward: where it stands, what it is, its FLOPs and the bytes it must move."""

    module: str
    name: str
    flops: int
    bytes: int
    speed: int = 1  # at how many times the machine's rate its products run

    @property
    def kind(self) -> str:
        """Returns the line of the map it belongs to."""
        if not self.flops:
            if "norm" in self.name:
                return "norms"
            return "copies" if any(word in self.name for word in COPIES) else "elementwise"
        if "embed" in self.module or "emb_layers" in self.module:
            return "embeddings"
        parts = self.module.split(".")
        if "transformer_blocks" in parts or parts[-1].startswith("proj_"):
            # a transformer's blocks stand in layer 1 (spatial) or 2 (temporal) of their stage, the stem's first
            where = "temporal" if parts[0] == "init_attn" or parts[2 if parts[0] != "middle_block" else 1] == "2" else "spatial"
            what = "attention" if "attention" in self.name else next(kind for part, kind in PRODUCTS.items() if part in parts)
            return f"{where} {what}"
        return "temporal convolution" if "temopral_conv" in parts or "temporal_conv" in parts else "spatial convolution"

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Seconds by arithmetic and by traffic."""
        return self.flops / machine.flops / self.speed, self.bytes / machine.bandwidth

    def floor(self, machine: Machine) -> float:
        return max(self.seconds(machine))


class Recorder(TorchDispatchMode):
    """Writes down every operator that moves data."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Writes an operator down if it made new memory from old; says whether it did."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        fresh = [x for x in made if x.untyped_storage()._cdata not in known]
        if fresh and given:
            name = func._schema.name.split("::")[1].strip("_")
            module = max(self.tracker.parents - {"Global"}, key=len, default="")
            flops, speed = count(func, name, args, kwargs, out), SPEED.get(name, 1)
            self.ops.append(Op(module.partition(".")[2], name, flops, moved(given + fresh), speed))
        return bool(fresh and given)


def moved(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct memory behind some tensors, as far as they see it."""
    seen = {(x.untyped_storage()._cdata, x.storage_offset()): x for x in tensors}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in seen.values())


def count(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Returns the FLOPs of products, a multiply-add being two; other arithmetic is never the limit."""
    if "temporal_attention" in name:
        return 4 * args[0].numel() * args[1].shape[1]  # q (B, T, P, heads, head_dim), k (B, Tk, ...)
    if name == "conv_e4m3":
        return 2 * out.numel() * args[1][0].numel()  # weight (O, kh, kw, C)
    if name in ("linear", "linear_e4m3"):
        return 2 * args[0].numel() * args[1].shape[0]  # x (..., in), weight (out, in)
    if "scaled_dot_product" in name:
        return 4 * args[0].numel() * args[1].shape[2]  # q (N, heads, L, head_dim), k (N, heads, Lk, ...)
    from torch.utils.flop_counter import flop_registry  # with it comes Triton

    formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    return formula(*args, **(kwargs or {}), out_val=out) if formula else 0


def traced(unet: UNet, inputs: Sequence[Tensor]) -> list[Op]:
    """Runs a network that holds no data, channels-last, and returns its ops; `tar`, the last of its inputs, as float32."""
    *given, tar = inputs
    lay_out(unet, "channels_last")
    return traced_call(lambda: unet(*given, tar.float()))


def traced_call(call: Callable[[], object]) -> list[Op]:
    """Returns the ops of a call that runs a network which holds no data."""
    tracker = ModuleTracker()
    with tracker, Recorder(tracker) as recorder:
        call()
    return recorder.ops


@contextmanager
def shapes_alone(dtype: torch.dtype) -> Iterator[None]:
    """Lets networks and inputs of `dtype` be made and run without data inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with without_data():
            yield
    finally:
        torch.set_default_dtype(before)


def ops_of(spec: Spec, frames: int, size: tuple[int, ...], dtype: torch.dtype, batch: int = GUIDANCE_BRANCHES) -> list[Op]:
    """Traces one forward of a clip of `frames` frames, conditioned on `batch` texts: the branches of guidance."""
    with shapes_alone(dtype):
        latents, timestep, context, *rest = step_inputs(spec, size, frames, "cpu", dtype)
        return traced(UNet(spec.unet).eval(), [latents, timestep, context[:batch], *rest])


def stage(op: Op) -> str:
    """Returns the official block an op stands in."""
    parts = op.module.split(".")
    return ".".join(parts[: 2 if parts[0].endswith("blocks") else 1]) or "unet"


KEYS: dict[str, Callable[[Op], str]] = {"kind": lambda op: op.kind, "block": stage, "op": lambda op: op.name}

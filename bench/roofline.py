"""A map of one UNet forward: FLOPs and bytes of every op, its floor on a machine, and which limit it meets there.

Nothing is computed: the network runs on tensors without data, in channels-last memory, both guidance branches in one batch.
An op's floor is the longer of its FLOPs at the matrix rate and its bytes, each tensor read or written once, at the bandwidth.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from vstar_engine.config import Sampling, Spec, model_named, parse_size
from vstar_engine.device import DTYPES, dtype_named
from vstar_engine.memory import without_data
from vstar_engine.unet import UNet

from .seeded import GUIDANCE_BRANCHES, lay_out, step_inputs

FRAMES = (16, 64, 128)
TERA = 1e12
# a scalar tensor or a row of embeddings moves nothing that counts
PRODUCTS = {
    "ff": "feed-forward",
    "attn1": "projections",
    "attn2": "projections",
    "proj_in": "projections",
    "proj_out": "projections",
}
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

    @property
    def kind(self) -> str:
        """The line of the map it belongs to."""
        if not self.flops:
            if "norm" in self.name:
                return "norms"
            return "copies" if any(word in self.name for word in COPIES) else "elementwise"
        if "embed" in self.module or "emb_layers" in self.module:
            return "embeddings"
        parts = self.module.split(".")
        # a transformer's blocks stand in layer 1 (spatial) or 2 (temporal) of their stage, the stem's first
        if "attention" in self.name:
            return ("temporal" if self.name.startswith("temporal") else "spatial") + " attention"
        if "transformer_blocks" in parts or parts[-1].startswith("proj_"):
            where = "temporal" if parts[0] == "init_attn" or parts[2 if parts[0] != "middle_block" else 1] == "2" else "spatial"
            return f"{where} {next(kind for part, kind in PRODUCTS.items() if part in parts)}"
        return "temporal convolution" if "temopral_conv" in parts or "temporal_conv" in parts else "spatial convolution"

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Seconds by arithmetic and by traffic."""
        return self.flops / machine.flops, self.bytes / machine.bandwidth

    def floor(self, machine: Machine) -> float:
        return max(self.seconds(machine))


def attention_flops(q: Tensor, k: Tensor, heads: int, length: int) -> int:
    """Both products of one attention."""
    return 4 * q.numel() // q.shape[length] * q.shape[length] * k.shape[length]


class Recorder(TorchDispatchMode):
    """Writes down every operator that moves data."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        fresh = [x for x in made if x.untyped_storage()._cdata not in known]
        if fresh and given:
            name = func._schema.name.split("::")[1].strip("_")
            module = max(self.tracker.parents - {"Global"}, key=len, default="")
            self.ops.append(Op(module.partition(".")[2], name, count(func, name, args, kwargs, out), moved(given + fresh)))
        return out


def moved(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct memory behind some tensors, as far as they see it."""
    seen = {(x.untyped_storage()._cdata, x.storage_offset()): x for x in tensors}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in seen.values())


def count(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of products, a multiply-add being two; other arithmetic never decides."""
    if "temporal_attention" in name:
        return 4 * args[0].numel() * args[1].shape[1]  # q (B, T, P, heads, head_dim), k (B, Tk, ...)
    if name == "linear":
        return 2 * args[0].numel() * args[1].shape[0]  # x (..., in), weight (out, in)
    if "scaled_dot_product" in name:
        return 4 * args[0].numel() * args[1].shape[2]  # q (N, heads, L, head_dim), k (N, heads, Lk, ...)
    from torch.utils.flop_counter import flop_registry  # with it comes Triton

    formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    return formula(*args, **(kwargs or {}), out_val=out) if formula else 0


def ops_of(spec: Spec, frames: int, size: tuple[int, int], dtype: torch.dtype, batch: int = GUIDANCE_BRANCHES) -> list[Op]:
    """Traces one forward of a clip of `frames` frames that hears `batch` texts, the branches of guidance."""
    with without_data(dtype):
        unet = lay_out(UNet(spec.unet, "sdpa").eval(), "channels_last")
        *inputs, tar = step_inputs(spec, size, frames, "cpu", dtype)
        tracker = ModuleTracker()
        with tracker, Recorder(tracker) as recorder:
            unet(*(x[:batch] for x in inputs), tar.float())
    return recorder.ops


def table(ops: list[Op], machine: Machine, key: Callable[[Op], str]) -> list[list[str]]:
    """A line per group, longest first: ops, TFLOP, GB, milliseconds by arithmetic, by traffic, floor, its share, the limit."""
    groups: dict[str, list[Op]] = {}
    for op in ops:
        groups.setdefault(key(op), []).append(op)
    whole = sum(op.floor(machine) for op in ops)
    lines = []
    for name, found in sorted(groups.items(), key=lambda item: -sum(op.floor(machine) for op in item[1])):
        arithmetic, traffic = (sum(op.seconds(machine)[i] for op in found) for i in (0, 1))
        floor = sum(op.floor(machine) for op in found)
        bound = sum(op.floor(machine) for op in found if op.seconds(machine)[0] >= op.seconds(machine)[1]) / floor
        limit = "arithmetic" if bound > 0.9 else "memory" if bound < 0.1 else f"arithmetic {bound:.0%}"
        work = f"{sum(op.flops for op in found) / TERA:.2f}", f"{sum(op.bytes for op in found) / 1e9:.2f}"
        times = (f"{1e3 * x:.2f}" for x in (arithmetic, traffic, floor))
        lines.append([name, str(len(found)), *work, *times, f"{floor / whole:.1%}", limit])
    return lines


HEAD = ["", "ops", "TFLOP", "GB", "ms, arithmetic", "ms, memory", "ms, floor", "share", "limit"]


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def stage(op: Op) -> str:
    """The official block an op stands in."""
    parts = op.module.split(".")
    return ".".join(parts[: 2 if parts[0].endswith("blocks") else 1]) or "unet"


def report(ops: list[Op], machine: Machine, by: str, steps: int) -> str:
    """The map in Markdown and two sums: op by op, and with all that is no product merged into its neighbours."""
    floor = sum(op.floor(machine) for op in ops)
    products = sum(op.floor(machine) for op in ops if op.flops)
    arithmetic = sum(op.flops for op in ops) / machine.flops
    keys = {"kind": lambda op: op.kind, "block": stage, "op": lambda op: op.name}
    words = (
        f"Floor of one forward {1e3 * floor:.1f} ms op by op; {1e3 * products:.1f} ms with norms, elementwise ops and copies "
        f"merged into the products; {1e3 * arithmetic:.1f} ms for the arithmetic alone. "
        f"{steps} steps: {steps * floor:.2f}, {steps * products:.2f} and {steps * arithmetic:.2f} s."
    )
    return f"{markdown(HEAD, table(ops, machine, keys[by]))}\n\n{words}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("--model", default="videocrafter2")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--size", type=parse_size, metavar="HEIGHTxWIDTH", help="default the model's own")
    parser.add_argument(
        "--batch", type=int, default=GUIDANCE_BRANCHES, choices=(1, 2), help="guidance branches, default %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--tflops", type=float, default=790.0, help="matrix rate, TFLOP/s; default %(default)s, a busy H200")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="memory, TB/s; default %(default)s, an H200's")
    parser.add_argument("--by", choices=("kind", "block", "op"), default="kind")


def run(args: argparse.Namespace) -> int:
    """Prints a map for each number of frames."""
    spec, machine = model_named(args.model), Machine(args.tflops * TERA, args.bandwidth * TERA)
    size = args.size or spec.size
    spec.check_size(*size)
    for frames in args.frames:
        ops = ops_of(spec, frames, size, dtype_named(args.dtype), args.batch)
        print(f"**{args.model}, {frames} frames of {size[0]}x{size[1]}, batch {args.batch}, {args.dtype}**\n")
        print(report(ops, machine, args.by, Sampling.steps) + "\n", flush=True)
    return 0

"""The ops around temporal attention, each against PyTorch's operators: whether fusing it pays, level by level.

Shapes are a network's own, hidden states in channels-last memory. Problems outgrow the cache and are taken in turn.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_engine.bench.harness.ceilings import ceilings
from vstar_engine.bench.harness.contest import Contest, NotHere, Provider
from vstar_engine.bench.harness.machine import cache_bytes
from vstar_engine.bench.harness.random_networks import lay_out, relative_error, seeded
from vstar_engine.bench.harness.timing import seconds_of_short
from vstar_engine.kernels.geglu import geglu, geglu_ref
from vstar_engine.kernels.gpu.autotune import autotune
from vstar_engine.kernels.gpu.device import device
from vstar_engine.kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_ref
from vstar_engine.kernels.guided_step import COEFFICIENTS, guided_step, guided_step_ref
from vstar_engine.kernels.linear import PYTORCH, candidates, feed_forward, linear, linear_ref
from vstar_engine.kernels.problems import LayerNorm, LinearProblem
from vstar_engine.networks.layers import FrameConv
from vstar_engine.networks.spatial_attention import best_attention, sdpa

from .attention_providers import COMPILED, OURS, check_ours
from .fp8_providers import roundings, small_convolutions, small_norms, small_projections
from .op_cases import EPS, ROWS, Call, OpCase, OpSite

CONVOLUTION, UPDATE = "temporal_convolution", "guided_step"
OPERATORS, VOLUME, PRODUCTS = "PyTorch's operators", "3-D convolution", "three products"
# Triton's product where the engine may choose it: on a GPU, in half precision, at its best tile
KERNEL = "Triton's product"
LAYERS = "two linear calls"
NAMES = (OURS, OPERATORS, COMPILED, VOLUME, PRODUCTS, KERNEL, LAYERS)
ON_GPU = frozenset([("cuda", torch.float16), ("cuda", torch.bfloat16)])
# relative L2 against float64; PyTorch's own operators show up to 1e-6, 5e-4 and 4e-3
ERROR_BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# PyTorch's norm of the decoder's 655,360 values a group strays 1.4e-5 in float32, ours 5e-7
DECODER_BUDGET = 5e-5
MAX_COPIES = 16
# channels of the latents
LATENTS = 4


def on_cpu(site: OpSite) -> bool:
    return (site.device.type, site.dtype) == ("cpu", torch.float32)


def on_gpu(site: OpSite) -> bool:
    return (site.device.type, site.dtype) in ON_GPU


def on_cuda(site: OpSite) -> bool:
    return site.device.type == "cuda"


def norms(site: OpSite) -> Iterator[OpCase]:
    """Group norm and SiLU per frame, as in residual blocks, over whole clips, as in temporal convolutions, and in decoding."""
    channels = site.channels
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "per frame": ((site.batch * site.frames, site.height, site.across, channels), site.groups),
        "whole clips": ((site.batch, site.frames, site.cells, channels), site.groups),
    }
    if site.decoded:
        shapes["VAE, per frame"] = (site.decoded, site.vae_groups)
    for name, (shape, groups) in shapes.items():

        def draw(shape: tuple[int, ...] = shape) -> tuple[Tensor, ...]:
            return (site.normal(*shape).movedim(-1, 1), *site.normal(2, shape[-1]).unbind())

        def call(compute: Call, x: Tensor, weight: Tensor, bias: Tensor, groups: int = groups) -> Tensor:
            return compute(x, groups, weight, bias, EPS)

        ours, definition = partial(call, groupnorm_silu), partial(call, groupnorm_silu_ref)
        budget = DECODER_BUDGET if shape is site.decoded else 0.0
        yield OpCase(name, draw, ours, definition, site.nbytes(2 * math.prod(shape)), budget=budget)


def gates(site: OpSite) -> Iterator[OpCase]:
    """Yields the feed-forward's gate behind a projection that another made."""
    inner = 4 * site.channels

    def draw() -> tuple[Tensor, ...]:
        return (site.normal(site.rows, 2 * inner),)

    yield OpCase("feed-forward", draw, geglu, geglu_ref, site.nbytes(3 * site.rows * inner), compared=ROWS)


def projections(site: OpSite) -> Iterator[OpCase]:
    """Projections with what is before and behind them: the norm of what attends, the gate, and the residuals."""
    width = site.channels
    # input, output and result widths
    uses = {
        "norm, q k v": (width, 3 * width, 3 * width),
        "norm, gate": (width, 8 * width, 4 * width),
        "residual, attention": (width, width, width),
        "residual, feed-forward": (4 * width, width, width),
    }
    for name, (in_features, out, result) in uses.items():
        normed = name.startswith("norm")

        def draw(in_features: int = in_features, out: int = out, normed: bool = normed) -> tuple[Tensor, ...]:
            given = site.normal(site.rows, in_features), site.weight(out, in_features), site.normal(out)
            return (*given, *site.normal(2, in_features).unbind()) if normed else (*given, site.normal(site.rows, out))

        def call(
            compute: Call,
            x: Tensor,
            weight: Tensor,
            bias: Tensor,
            *more: Tensor,
            normed: bool = normed,
            gate: bool = result < out,
        ) -> Tensor:
            if normed:
                return compute(LinearProblem(x, weight, bias, None, gate, more[0], more[1], EPS))
            return compute(LinearProblem(x, weight, bias, more[0]))

        moved = site.nbytes(site.rows * (in_features + result * (1 if normed else 2)), out * in_features)
        items, work = (0,) if normed else (0, 3), 2.0 * site.rows * in_features * out
        ours, definition, kernel = (partial(call, compute) for compute in (linear, linear_ref, by_triton))
        others: dict[str, Call] = {KERNEL: kernel} if on_gpu(site) else {}
        yield OpCase(
            name, draw, ours, definition, moved, work, items, ROWS, others, serves=lambda site: on_cpu(site) or on_gpu(site)
        )


def feed_forwards(site: OpSite) -> Iterator[OpCase]:
    """Yields both layers of a feed-forward in one call, against one call a layer."""
    width, inner = site.channels, 4 * site.channels

    def draw() -> tuple[Tensor, ...]:
        first, second = (
            (site.weight(2 * inner, width), site.normal(2 * inner)),
            (site.weight(width, inner), site.normal(width)),
        )
        return (site.normal(site.rows, width), *first, *second, *site.normal(2, width).unbind())

    def layers(multiply: Call, x: Tensor, one: Tensor, bias: Tensor, two: Tensor, other: Tensor, *norm: Tensor) -> Tensor:
        made = multiply(LinearProblem(x, one, bias, None, True, *norm, EPS))
        return multiply(LinearProblem(made, two, other, x))

    def ours(x: Tensor, one: Tensor, bias: Tensor, two: Tensor, other: Tensor, *norm: Tensor) -> Tensor:
        return feed_forward(x, (one, bias), (two, other), LayerNorm(*norm, EPS))

    moved, work = site.nbytes(2 * site.rows * width, 3 * inner * width), 6.0 * site.rows * inner * width
    definition, others = partial(layers, linear_ref), {LAYERS: lambda *given: layers(linear, *given)}
    yield OpCase("norm to residual", draw, ours, definition, moved, work, (0,), ROWS, others, serves=on_cpu)


def by_triton(problem: LinearProblem) -> Tensor:
    """Computes by Triton's product alone, at the tile that is timed to be the fastest."""
    found = candidates(problem, device(problem.x).arch)
    return autotune(("Triton", problem.case), {name: call for name, call in found.items() if name != PYTORCH})


def attentions(site: OpSite) -> Iterator[OpCase]:
    """Spatial attention within each frame, and to its text."""
    images, heads, width = site.batch * site.frames, site.heads, site.channels // site.heads
    for name, keys in (("self", site.cells), ("text", site.text)):

        def draw(keys: int = keys) -> tuple[Tensor, ...]:
            if keys == site.cells:
                return site.normal(images, keys, 3, heads, width).unbind(2)
            return (site.normal(images, site.cells, heads, width), *site.normal(images, keys, 2, heads, width).unbind(2))

        moved = site.nbytes(2 * images * (site.cells + keys) * site.channels)
        work = 4.0 * images * site.cells * keys * site.channels
        yield OpCase(name, draw, best_attention, sdpa, moved, work, (0, 1, 2), serves=on_cpu)


def convolutions(site: OpSite) -> Iterator[OpCase]:
    """Yields the convolution over frames: the engine's, PyTorch's in two and in three dimensions, and three products."""
    module = lay_out(seeded(lambda: FrameConv(site.channels), site.device, site.dtype), "channels_last")
    shape = (site.batch, site.frames, site.cells, site.channels)
    bias = module.bias
    assert bias is not None
    bias.normal_()

    def draw() -> tuple[Tensor, ...]:
        return (site.normal(*shape).movedim(-1, 1),)

    def flat(x: Tensor) -> Tensor:
        return F.conv2d(x, module.weight.to(x.dtype).flatten(3), bias.to(x.dtype), padding=(1, 0))

    def volume(x: Tensor) -> Tensor:
        return F.conv3d(x.unflatten(3, (site.height, site.across)), module.weight, bias, padding=(1, 0, 0)).flatten(3)

    def products(x: Tensor) -> Tensor:
        return by_products(x, module.weight, bias)

    work = 6.0 * site.rows * site.channels**2
    moved = site.nbytes(2 * math.prod(shape), 3 * site.channels**2)
    yield OpCase("3x1x1", draw, module, flat, moved, work, others={VOLUME: volume, PRODUCTS: products})


def updates(site: OpSite) -> Iterator[OpCase]:
    """Yields what follows the network in a step: guidance and the sampler's update of latents in float32."""
    shape = (site.batch, LATENTS, site.frames, site.height, site.across)
    plain = torch.arange(site.batch, 2 * site.batch, device=site.device)

    def draw() -> tuple[Tensor, ...]:
        latents, noise = torch.randn(2, *shape, device=site.device)
        weights = torch.rand(site.batch, len(COEFFICIENTS), device=site.device)
        return latents, site.normal(2 * site.batch, *shape[1:]), weights, noise

    def call(compute: Callable[..., tuple[Tensor, Tensor]], x: Tensor, eps: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        return compute(x, eps, plain, weights, noise)[0]

    moved = math.prod(shape) * (4.0 * torch.float32.itemsize + 2.0 * site.dtype.itemsize)
    ours, definition = partial(call, guided_step), partial(call, guided_step_ref)
    yield OpCase("guidance, DDIM", draw, ours, definition, moved, None, (), site.batch, serves=on_cuda)


def by_products(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolves (B, C, T, P) in channels-last memory over frames by three products, two of them shifted by a frame."""
    rows, cells = x.movedim(1, -1).flatten(1, 2), x.shape[3]  # (B, T * P, C), a view
    before, here, after = (weight[:, :, i, 0, 0].mT.expand(len(rows), -1, -1) for i in range(3))
    out = torch.baddbmm(bias, rows, here)
    out[:, cells:].baddbmm_(rows[:, :-cells], before)
    out[:, :-cells].baddbmm_(rows[:, cells:], after)
    return out.unflatten(1, x.shape[2:]).movedim(-1, 1)


OPS: dict[str, Callable[[OpSite], Iterator[OpCase]]] = {
    "groupnorm_silu": norms,
    "geglu": gates,
    "to_e4m3": roundings,
    "conv_e4m3": small_convolutions,
    "norm_e4m3": small_norms,
    "linear_e4m3": small_projections,
    "linear": projections,
    "feed_forward": feed_forwards,
    "spatial_attention": attentions,
    CONVOLUTION: convolutions,
    UPDATE: updates,
}


def contests(op: str, site: OpSite, level: int, chosen: Sequence[str], compiler: str) -> Iterator[Contest]:
    """Sets each use of an op at one site against PyTorch's operators, and these compiled; the latents have one level."""
    if op == UPDATE and level:
        return
    for form in OPS[op](site):
        copies = min(MAX_COPIES, math.ceil(2 * cache_bytes(site.device) / form.bytes))
        drawn = [form.draw() for _ in range(copies)]
        calls = {OURS: form.ours, OPERATORS: form.definition, COMPILED: form.definition, **form.others}
        providers = [
            Provider(name, partial(prepare, name, form, call, drawn, site, compiler), traced=name != COMPILED)
            for name, call in calls.items()
            if not chosen or name in chosen
        ]
        case = {"op": op, "form": form.name, "level": level, "frames": site.frames, "batch": site.batch}
        yield Contest(
            *("kernels", {**case, "shape": "x".join(map(str, drawn[0][0].shape))}, site.dtype, site.device, providers),
            error_of(form, drawn[0]),
            max(ERROR_BUDGET[site.dtype], form.budget),
            form.bytes,
            form.flops,
            ceilings(site.device, site.dtype),
            seconds_of_short,
        )


def error_of(form: OpCase, drawn: tuple[Tensor, ...]) -> Callable[[str, Tensor], float]:
    """Returns what holds an answer to the definition in float64, at items from the first to the last."""
    count = len(drawn[0])
    here = torch.linspace(0, count - 1, min(form.compared, count), device=drawn[0].device).long()
    exact = form.definition(*((x[here] if i in form.items else x).double() for i, x in enumerate(drawn))).double()

    def error(name: str, answer: Tensor) -> float:
        if answer.shape != (count, *exact.shape[1:]):
            return math.inf
        return relative_error(answer[here], exact)

    return error


def prepare(
    name: str, form: OpCase, call: Call, drawn: Sequence[tuple[Tensor, ...]], site: OpSite, compiler: str
) -> Callable[[], Tensor]:
    """Returns a call that takes the problems in turn, the first one first."""
    if name == OURS:
        if not form.serves(site):
            raise NotHere("here the engine runs PyTorch's operators")
        check_ours(site.device)
    if name == COMPILED:
        # torch.compile tells apart what it wraps only so often
        torch.compiler.reset()
    made = torch.compile(call, backend=compiler, fullgraph=True, dynamic=False) if name == COMPILED else call
    turns = itertools.cycle(drawn)
    return lambda: made(*next(turns))

"""Steps that replay CUDA graphs: to the bit what they are plainly. On a CPU over a stand-in, on a GPU over CUDA's own."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import fake_graphs
import pytest
import torch
from torch import Tensor, nn

from vstar_engine import Engine, Sampling, Tar, analysis, memory
from vstar_engine.backends import eager
from vstar_engine.backends.eager import RecordedUnet
from vstar_engine.backends.graphs import SHAPES, Recent, Recording
from vstar_engine.bench.scene import TINY
from vstar_engine.bench.seeded import lay_out, seeded, step_inputs
from vstar_engine.config import Request
from vstar_engine.errors import MemoryShortage
from vstar_engine.sampling import coefficients
from vstar_engine.schedule import Schedule
from vstar_engine.step import Call, Given, Step, Texts, take
from vstar_engine.step_cache import Deep
from vstar_engine.unet import UNet
from vstar_engine.warm import shortened

CPU = torch.device("cpu")
CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)


@pytest.fixture
def graphs(monkeypatch):
    """The class of the stand-in's graphs."""
    return fake_graphs.install(monkeypatch)


@pytest.fixture(params=[CPU, CUDA], ids=str)
def device(request, monkeypatch):
    if request.param.type == "cpu":
        fake_graphs.install(monkeypatch)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    return request.param


def networks(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[RecordedUnet, UNet]:
    """Two networks of the same weights: one that records and a plain one."""
    recorded, plain = (seeded(lambda kind=kind: kind(TINY.unet), device, dtype) for kind in (RecordedUnet, UNet))
    return lay_out(recorded, "channels_last"), lay_out(plain, "channels_last")


def step(
    unet: UNet, frames: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, texts: Texts | None = None, **deep: Any
) -> Step:
    """A guided step of one video; everything in it is another for another seed."""
    device = next(unet.parameters()).device
    latents, timestep, context, fps, tar = step_inputs(TINY, TINY.size, frames, device, dtype)
    clock = unet.clock(timestep[0] - 40 * seed, fps + seed)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    weights = coefficients(Schedule.ddim(5), torch.tensor([3.0 + seed]))[seed].float().to(device)
    latents, tar, plain = latents.float() + seed, tar * (1 - 0.2 * seed), torch.ones(1, dtype=torch.int64, device=device)
    given = Given(latents, clock.table[0], fps, tar, weights, noise, plain)
    texts = texts or Texts((context[:1] * (1 - 0.1 * seed), context[1:, :1] * (1 - 0.1 * seed)))
    return Step(dtype, clock, (Call((0,), texts, **deep),), given)


def equal(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_replayed_step_is_the_plain_one_to_the_bit(device, dtype, mode):
    """Plain, captured, and replayed with other values of everything; earlier results stay."""
    recorded, plain = networks(device, dtype)
    with mode():
        ours = [recorded.replay(step(recorded, seed=seed, dtype=dtype)) for seed in (0, 1, 2, 3)]
        theirs = [take(plain, step(plain, seed=seed, dtype=dtype)) for seed in (0, 1, 2, 3)]
    assert all(map(equal, ours, theirs))
    assert not torch.equal(ours[2][0], ours[3][0])
    (fixed,) = recorded.recent.values()
    assert fixed.recording.graph is not None


@torch.no_grad()
def test_texts_are_projected_where_others_are_heard(device, monkeypatch):
    recorded, plain = networks(device)
    projected, project = [], recorded.projected
    monkeypatch.setattr(recorded, "projected", lambda contexts: projected.append(len(contexts)) or project(contexts))
    own, other = (step(plain, seed=seed).calls[0].texts for seed in (0, 3))
    for seed, heard in enumerate([own, own, own, other, other, own]):
        mine = recorded.replay(step(recorded, seed=seed % 5, texts=heard))
        assert equal(mine, take(plain, step(plain, seed=seed % 5, texts=Texts(heard.contexts))))
    assert projected == [2, 2, 2]


@torch.no_grad()
def test_steps_on_kept_features_are_recorded_too(device):
    """Whole steps give their features, and steps on features take whichever they are given."""
    recorded, plain = networks(device)
    stages, found = TINY.unet.num_res_blocks + 1, []
    for unet, run in ((recorded, recorded.replay), (plain, partial(take, plain))):
        kept = [run(step(unet, seed=seed, deep=Deep(stages))) for seed in (0, 1, 2)]
        cached = [run(step(unet, seed=seed, deep=Deep(stages, kept[seed][2]))) for seed in (2, 1, 0)]
        found.append([*kept, *cached])
    assert all(map(equal, *found))
    assert [len(made) for made in found[0]] == [3, 3, 3, 2, 2, 2]
    assert not torch.equal(found[0][3][0], found[0][4][0])
    whole, part = recorded.recent.values()
    assert None not in (whole.recording.graph, part.recording.graph)
    assert whole.kept.calls[0].texts is part.kept.calls[0].texts
    del whole, part
    recorded.forget()
    assert not recorded.heard


@torch.no_grad()
def test_every_shape_is_recorded_and_the_last_few_are_kept(device):
    recorded, plain = networks(device)
    for frames in [*range(1, SHAPES + 2)] * 2 + [SHAPES + 1] * 2:
        assert equal(recorded.replay(step(recorded, frames, seed=1)), take(plain, step(plain, frames, seed=1)))
    assert len(recorded.recent) == SHAPES
    # one shape too many in turn, and none comes to its second run; the last came to three
    assert [fixed.recording.runs for fixed in recorded.recent.values()] == [1] * (SHAPES - 1) + [3]


@torch.no_grad()
def test_latents_in_any_layout_and_another_call_mode(device):
    """Buffers made under inference mode may be written outside it, and views are read as they are."""
    recorded, plain = networks(device)
    with torch.inference_mode():
        recorded.replay(step(recorded))

    def strided(unet: UNet) -> Step:
        made = step(unet, seed=1)
        latents = made.given.latents.transpose(3, 4).contiguous().transpose(3, 4)
        return replace(made, given=made.given._replace(latents=latents))

    assert all(equal(recorded.replay(strided(recorded)), take(plain, strided(plain))) for _ in range(3))


@torch.no_grad()
def test_only_the_second_run_of_a_shape_is_captured(graphs):
    recorded, _ = networks(CPU)
    counts = []
    for seed in range(4):
        recorded.replay(step(recorded, seed=seed))
        counts.append(graphs.replays)
    assert counts == [0, 1, 2, 3]
    assert recorded.nbytes == 2**20


@torch.no_grad()
def test_hooks_are_heard(device):
    """Attention maps are read by hooks, which a replay would not call."""
    recorded, _ = networks(device)
    for seed in range(3):
        recorded.replay(step(recorded, seed=seed))
    with analysis.recorded(recorded, [0]) as recording:
        recorded.replay(step(recorded))
    assert recording.passes == 1
    assert recording.attentions


def test_gradients_pass(device):
    """Noise may be optimised through the network, and through a step."""
    recorded, plain = networks(device)
    found = []
    for network, run in ((recorded, recorded.replay), (plain, partial(take, plain))):
        made = step(network)
        latents = made.given.latents.requires_grad_()
        run(made)[0].square().sum().backward()
        found.append(latents.grad)
    assert torch.equal(*found)
    assert not recorded.recent


@torch.no_grad()
def test_replaced_parameters_need_a_new_recording(device):
    """A graph reads where parameters were, so what changes them all forgets it."""
    recorded, plain = networks(device)
    before = [recorded.replay(step(recorded)) for _ in range(3)][-1]
    last = recorded.out[2]
    last.weight = nn.Parameter(2 * last.weight, requires_grad=False)
    plain.out[2].weight = nn.Parameter(2 * plain.out[2].weight, requires_grad=False)
    assert equal(recorded.replay(step(recorded)), before)
    assert recorded.forget()
    assert not recorded.forget()
    assert all(equal(recorded.replay(step(recorded)), take(plain, step(plain))) for _ in range(3))
    recorded.to(torch.float64)
    assert not recorded.recent


@torch.no_grad()
def test_what_is_dropped_is_freed_at_once(graphs):
    """Its memory is wanted, so nothing of it may wait for Python's collector."""
    recorded, _ = networks(CPU)
    for frames in (2, 2, 3, 3):
        recorded.replay(step(recorded, frames))
    kept = [weakref.ref(fixed.recording.graph) for fixed in recorded.recent.values()]
    gc.disable()
    try:
        recorded.recent.popitem(last=False)
        assert [reference() is None for reference in kept] == [True, False]
        recorded.forget()
        assert kept[1]() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_capture_that_failed_is_not_tried_again(graphs):
    wrong = [RuntimeError("operation not permitted when stream is capturing")]

    def call():
        if recording.runs == 2 and wrong:
            raise wrong.pop()
        return torch.ones(2)

    recording = Recording(call, CPU)
    recording()
    with pytest.raises(RuntimeError, match="not permitted"):
        recording()
    assert torch.equal(recording(), torch.ones(2))
    assert graphs.replays == 0
    assert recording.graph is None


def test_what_was_not_used_for_longest_makes_room():
    kept = Recent()
    for key in range(SHAPES):
        kept.take(key, lambda key=key: -key)
    assert kept.take(0, lambda: 1) == 0
    assert kept.take(SHAPES, lambda: 9) == 9
    assert list(kept) == [*range(2, SHAPES), 0, SHAPES]


@pytest.fixture
def engine(graphs, mini_weights, monkeypatch):
    """The mini model on the CPU with steps that are recorded as on a GPU."""
    monkeypatch.setattr(eager, "UNet", RecordedUnet)
    return Engine.load("mini", mini_weights)


QUICK = {"frames": 2, "size": (32, 32), "seed": 1, "sampling": Sampling(steps=4, guidance=6.0)}


def test_a_video_is_the_plain_ones_to_the_byte(engine, mini, graphs):
    ours, theirs = (one.generate(["snow", "flowers"], **QUICK) for one in (engine, mini))
    assert (ours.frames == theirs.frames).all()
    assert graphs.replays == 3


def walked(engine: Engine, requests: Sequence[Request], drop: Sequence[int] = ()) -> dict[int, Tensor]:
    """Gives the last latents of videos made together, less those of `drop`, which leave one by one after each step."""
    batch, leaving = engine.begin(requests), list(drop)
    while batch.done < batch.steps:
        batch.step()
        if leaving:
            batch.drop(leaving.pop())
    return {row.index: row.latents for row in batch.rows}


def unlike(**sampling: Any) -> list[Request]:
    """Three videos whose every setting is their own, but for what `sampling` says."""
    own = [{"guidance": 6.0}, {"guidance": 1.0, "fps_condition": 8}, {"guidance": 3.0, "eta": 0.0}]
    tar = [Tar({0: 1.0, 1: 8.0}, until_step=1), None, Tar({0: 4.0}, strength=0.5)]
    states = [("snow", "flowers"), ("a red ball",), ("rain", "sun", "night")]
    return [
        Request(states[i], 3, i, (32, 32), Sampling(**{"steps": 6, **own[i], **sampling}), tar[i]) for i in range(3)
    ]  # fmt: skip


@pytest.mark.parametrize("drop", [(), (0, 2)], ids=str)
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"guidance": 4.0},
        {"batch_guidance": False},
        {"guidance": 4.0, "fast": ("guidance-interval", "step-cache")},
        {"guidance": 1.0, "eta": 1.0, "fast": ("few-step",)},
    ],
    ids=["mixed", "guided", "two passes", "interval and cache", "few"],
)
def test_videos_of_unlike_settings_and_cancellation_replay_as_they_run_plainly(engine, mini, graphs, sampling, drop):
    ours, theirs = (walked(one, unlike(**sampling), drop) for one in (engine, mini))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(latents, theirs[index]) for index, latents in ours.items())
    assert graphs.replays or drop


def test_batches_of_one_shape_may_take_turns(engine, mini):
    """As a server's do: each finds its own texts, noise and latents again."""
    found = []
    for one in (engine, mini):
        batches = [one.begin([request]) for request in (unlike(guidance=4.0)[0], unlike(guidance=5.0)[2])]
        for _ in range(batches[0].steps):
            for batch in batches:
                batch.step()
        found.append([batch.rows[0].latents for batch in batches])
    assert equal(*found)
    assert len(engine.denoiser.recent) == 1


def test_no_request_waits_for_a_recording_of_a_warmed_clip(graphs, mini, mini_weights, monkeypatch):
    """Nothing is captured after loading, whether guided or not and whole or not; the video is the same."""
    monkeypatch.setattr(eager, "UNet", RecordedUnet)
    engine = Engine.load("mini", mini_weights, warm=[(2, 32, 32)])
    sampling = Sampling(steps=10, guidance=6.0, fast=("guidance-interval", "step-cache"))
    engine.warm([(2, 32, 32)], sampling)
    monkeypatch.setattr(Recording, "_capture", lambda self: pytest.fail("a request was captured"))
    known, before = len(engine.denoiser.recent), graphs.replays
    ours, theirs = (one.generate("snow", **QUICK) for one in (engine, mini))
    assert (ours.frames == theirs.frames).all()
    assert graphs.replays == before + 4
    engine.generate("snow", **{**QUICK, "sampling": sampling})
    assert graphs.replays == before + 14
    assert len(engine.denoiser.recent) == known == 5


def test_an_engine_without_a_text_tower_is_warmed(engine):
    bare = Engine(**{**vars(engine), "text": None})
    bare.warm([(2, 32, 32)])
    assert len(bare.denoiser.recent) == 1


@pytest.mark.parametrize(
    ("sampling", "steps"),
    [
        (Sampling(), 2),
        (Sampling(1), 1),
        (Sampling.few(), 2),
        (Sampling(fast=("step-cache",)), 4),
        (Sampling(fast=("guidance-interval",)), 5),
        (Sampling(fast=("guidance-interval", "step-cache")), 10),
        (Sampling(3, fast=("step-cache",)), 3),
    ],
    ids=str,
)
def test_warming_takes_every_kind_of_step_twice(sampling, steps):
    assert shortened(sampling).steps == steps


def test_the_command_warms_before_its_first_step(graphs, monkeypatch, tmp_path):
    from vstar_engine.cli import main  # its libraries may be missing on a GPU machine, where the others run

    monkeypatch.setattr(eager, "UNet", RecordedUnet)
    told = []
    monkeypatch.setattr(Engine, "warm", lambda self, clips, sampling: told.append((clips, sampling.steps)))
    arguments = ["--model", "mini", "--states", "snow", "--frames", "2", "--size", "32x32", "--steps", "2"]
    assert main(["generate", *arguments, "--out", str(tmp_path / "a.mp4")]) == 0
    assert told == [([(2, 32, 32)], 2)]


def test_a_lora_is_heard_at_once(engine, mini_weights, tmp_path):
    from safetensors.torch import save_file
    from test_lora import LAYERS, factors, kohya

    save_file(kohya(factors(LAYERS)), tmp_path / "lora.safetensors")
    plain = engine.generate("snow", **QUICK)
    engine.adapt([str(tmp_path / "lora.safetensors")])
    adapted = Engine.load("mini", mini_weights, loras=[str(tmp_path / "lora.safetensors")])
    assert (engine.generate("snow", **QUICK).frames == adapted.generate("snow", **QUICK).frames).all()
    engine.adapt()
    assert (engine.generate("snow", **QUICK).frames == plain.frames).all()


def test_recordings_make_room_for_what_does_not_fit_beside_them(engine, monkeypatch):
    engine.generate("snow", **QUICK)
    assert engine.denoiser.nbytes == 2**20
    asked = []

    def check(footprint, device, loaded, kept=0):
        asked.append((kept, len(engine.denoiser.recent)))
        if kept:
            raise MemoryShortage("does not fit")

    monkeypatch.setattr(memory, "check", check)
    engine.generate("snow", **QUICK)
    assert asked == [(2**20, 1), (0, 0)]


def test_recordings_make_room_for_decoding(engine, monkeypatch):
    """Where not one frame fits beside them they go; the video is the same."""
    before = engine.generate("snow", **QUICK)
    free = int(memory.MARGIN * memory.frame_bytes(engine.spec, 32, 32, torch.float32)) + memory.WORKSPACE + 2**19
    engine.denoiser.forget()
    monkeypatch.setattr(memory, "check", lambda *given, **named: None)
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    sizes = []
    after = engine.run(engine_request(), on_part=lambda part: sizes.append(len(part.frames)))
    assert sizes == [1, 1]
    assert not engine.denoiser.recent
    assert (after.frames == before.frames).all()


def engine_request() -> Request:
    return Request(("snow",), **QUICK)


def test_a_shortage_without_recordings_is_one(engine, monkeypatch):
    def check(*given, **named):
        raise MemoryShortage("does not fit")

    monkeypatch.setattr(memory, "check", check)
    with pytest.raises(MemoryShortage):
        engine.generate("snow", **QUICK)


def test_memory_that_the_allocator_holds_unused_is_free_but_for_what_graphs_keep(monkeypatch):
    for name, value in {"memory_reserved": 1000, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 9000))
    monkeypatch.setattr(memory, "activation_bytes", lambda request: 5600)
    footprint = memory.Footprint(TINY, 2, 32, 32, torch.float32, 1)
    device = torch.device("cuda")
    assert memory.available_bytes(device) == 5700
    memory.check(footprint, device, loaded=True, kept=100)
    with pytest.raises(MemoryShortage):
        memory.check(footprint, device, loaded=True, kept=101)


@pytest.mark.gpu
def test_an_engine_records_on_a_gpu_unless_told_not_to(mini_weights):
    recorded, plain = (Engine.load("mini", mini_weights, device="cuda", text=None, graphs=graphs) for graphs in (True, False))
    assert type(recorded.denoiser) is RecordedUnet
    assert type(plain.denoiser) is UNet
    assert torch.backends.cudnn.benchmark
    ours, theirs = (walked(one, unlike()) for one in (recorded, plain))
    assert all(torch.equal(latents, theirs[index]) for index, latents in ours.items())
    assert memory.available_bytes(torch.device("cuda")) > recorded.denoiser.nbytes > 0

"""Videos by steps that replay CUDA graphs, on a stand-in: the plain ones to the byte, warmed, adapted, and short of memory."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from support.engines import engine_like
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.backends import eager
from vstar_engine.backends.cuda_graphs import SHAPES
from vstar_engine.backends.eager import RecordedUnet
from vstar_engine.bench.harness.random_networks import lay_out, seeded
from vstar_engine.bench.step.workload import TINY
from vstar_engine.config.request import Request
from vstar_engine.errors import MemoryShortage
from vstar_engine.machine import memory
from vstar_engine.networks.unet import UNet
from vstar_engine.serving.workers.engine_renderer import EngineRenderer
from vstar_engine.serving.workers.warmup import warm
from vstar_engine.warmup import shortened


def tiny(mini: Engine, kind: type[UNet]) -> Engine:
    """An engine with a small network of random weights, always the same."""
    unet = lay_out(seeded(lambda: kind(TINY.unet), "cpu", torch.float32), "channels_last")
    return engine_like(mini, spec=TINY, denoiser=unet)


@pytest.fixture
def engine(graphs, mini):
    """An engine on the CPU whose steps are recorded as on a GPU."""
    return tiny(mini, RecordedUnet)


@pytest.fixture(scope="module")
def plain(mini):
    return tiny(mini, UNet)


@pytest.fixture
def recording(graphs, monkeypatch):
    """Makes engines that are loaded on the CPU record their steps as on a GPU."""
    monkeypatch.setattr(eager, "UNet", RecordedUnet)


class OnGpu(EngineRenderer):
    """A renderer that says of its engine that it is on a GPU."""

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "device": "cuda:0"}


QUICK = {"frames": 2, "size": (32, 32), "seed": 1, "sampling": Sampling(steps=4, guidance=6.0)}


def test_a_video_is_the_plain_ones_to_the_byte(engine, plain, graphs):
    ours, theirs = (one.generate(["snow", "flowers"], **QUICK) for one in (engine, plain))
    assert (ours.frames == theirs.frames).all()
    assert graphs.replays == 3


def walked(engine: Engine, requests: Sequence[Request], drop: Sequence[int] = ()) -> dict[int, Tensor]:
    """Returns the last latents of videos made together, less those of `drop`, which leave one by one after each step."""
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
def test_videos_of_unlike_settings_and_cancellation_replay_as_they_run_plainly(engine, plain, graphs, sampling, drop):
    ours, theirs = (walked(one, unlike(**sampling), drop) for one in (engine, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(latents, theirs[index]) for index, latents in ours.items())
    assert graphs.replays or drop


def test_batches_of_one_shape_may_take_turns(engine, plain):
    """As a server's do: each finds its own texts, noise and latents again."""
    found = []
    for one in (engine, plain):
        batches = [one.begin([request]) for request in (unlike(guidance=4.0)[0], unlike(guidance=5.0)[2])]
        for _ in range(batches[0].steps):
            for batch in batches:
                batch.step()
        found.append([batch.rows[0].latents for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(engine.denoiser.recent) == 1


def test_no_request_waits_for_a_recording_of_a_warmed_clip(engine, plain, graphs):
    """Nothing is captured after warming, whether guided or not and whole or not; the video is the same."""
    engine.warm([(2, 32, 32)])
    sampling = Sampling(steps=10, guidance=6.0, fast=("guidance-interval", "step-cache"))
    engine.warm([(2, 32, 32)], sampling)
    known, before, captures = len(engine.denoiser.recent), graphs.replays, graphs.captures
    ours, theirs = (one.generate("snow", **QUICK) for one in (engine, plain))
    assert (ours.frames == theirs.frames).all()
    assert graphs.replays == before + 4
    engine.generate("snow", **{**QUICK, "sampling": sampling})
    assert (graphs.replays, graphs.captures) == (before + 14, captures)
    assert len(engine.denoiser.recent) == known == 5


def test_no_job_waits_for_a_recording_of_a_bucket_that_a_server_warmed(engine, graphs):
    """Batches of up to three are more shapes than are kept unasked; any of their videos may be guided."""
    model = OnGpu(engine)
    warm(model, [(1, 32, 32)], 3, {"batch_limits": {"1x32x32": 3}})
    made = len(model.engine.denoiser.recent)
    assert made == 9 > SHAPES
    captures = graphs.captures
    for guidances in ((1.0,), (1.0, 6.0), (6.0, 1.0, 3.0), (1.0, 1.0, 6.0), (6.0, 5.0, 4.0)):
        before = graphs.replays
        walked(model.engine, [Request(("snow",), 1, 0, (32, 32), Sampling(1, guidance=guidance)) for guidance in guidances])
        assert (graphs.replays, graphs.captures) == (before + 1, captures)
    assert len(model.engine.denoiser.recent) == made


def test_an_engine_without_a_text_tower_is_warmed(engine):
    bare = engine_like(engine, text=None)
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


def test_the_command_warms_before_its_first_step(recording, mini_weights, monkeypatch, tmp_path):
    from vstar_engine.commands.main import main  # its libraries may be missing on a GPU machine, where the others run

    told = []
    monkeypatch.setattr(Engine, "warm", lambda self, clips, *sampling: told.append((clips, *(each.steps for each in sampling))))
    arguments = ["--model", "mini", "--states", "snow", "--frames", "2", "--size", "32x32", "--steps", "2"]
    assert main(["generate", *arguments, "--out", str(tmp_path / "a.mp4")]) == 0
    assert told == [([(2, 32, 32)], 2)]
    Engine.load("mini", mini_weights, warm=[(3, 32, 32)])
    assert told[1:] == [([(3, 32, 32)],)]


def test_a_lora_is_heard_at_once(recording, mini_weights, tmp_path):
    from safetensors.torch import save_file

    from support.lora_files import LAYERS, factors, kohya

    save_file(kohya(factors(LAYERS)), tmp_path / "lora.safetensors")
    engine = Engine.load("mini", mini_weights)
    plain = engine.generate("snow", **QUICK)
    engine.adapt([str(tmp_path / "lora.safetensors")])
    adapted = Engine.load("mini", mini_weights, loras=[str(tmp_path / "lora.safetensors")])
    assert (engine.generate("snow", **QUICK).frames == adapted.generate("snow", **QUICK).frames).all()
    engine.adapt()
    assert (engine.generate("snow", **QUICK).frames == plain.frames).all()


def test_recordings_make_room_for_what_does_not_fit_beside_them(engine, graphs, free_memory):
    engine.generate("snow", **QUICK)
    assert engine.denoiser.graph_bytes() == 2**20
    needed = memory.activation_bytes(memory.Footprint.of(engine_request(), engine.spec, torch.float32))
    for free, captures in ((needed + 2**20, 1), (needed + 2**19, 2)):
        free_memory(free)
        engine.generate("snow", **QUICK)
        assert graphs.captures == captures


def test_recordings_make_room_for_decoding(engine, free_memory):
    """Where not one frame fits beside them they go; the video is the same."""
    before = engine.generate("snow", **QUICK)
    free = int(memory.MARGIN * memory.frame_bytes(engine.spec, 32, 32, torch.float32)) + memory.WORKSPACE + 2**19
    engine.denoiser.forget_graphs()
    free_memory(free)
    sizes = []
    after = engine.run(engine_request(), on_frames=lambda part: sizes.append(len(part.frames)))
    assert sizes == [1, 1]
    assert not engine.denoiser.recent
    assert (after.frames == before.frames).all()


def engine_request() -> Request:
    return Request(("snow",), **QUICK)


def test_a_shortage_without_recordings_is_one(engine, free_memory):
    free_memory(2**20)
    with pytest.raises(MemoryShortage):
        engine.generate("snow", **QUICK)


def test_memory_that_the_allocator_holds_unused_is_free_but_for_what_graphs_keep(monkeypatch):
    footprint = memory.Footprint(TINY, 2, 32, 32, torch.float32, 1)
    free = memory.activation_bytes(footprint) - 600
    for name, value in {"memory_reserved": 1000, "memory_allocated": 300, "mem_get_info": (free, 2 * free)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    device = torch.device("cuda")
    assert memory.available_bytes(device) == free + 700
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
    assert memory.available_bytes(torch.device("cuda")) > recorded.denoiser.graph_bytes() > 0

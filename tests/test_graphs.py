"""Steps that replay CUDA graphs: to the bit what they are plainly. On a CPU over a stand-in, on a GPU over CUDA's own."""

import gc
import weakref

import fake_graphs
import pytest
import torch
from torch import Tensor, nn

from vstar_engine import Engine, Sampling, analysis, memory
from vstar_engine.backends import eager
from vstar_engine.backends.eager import RecordedUnet
from vstar_engine.backends.graphs import SHAPES, Recent, Recording
from vstar_engine.bench.scene import TINY
from vstar_engine.bench.seeded import lay_out, seeded, step_inputs
from vstar_engine.config import Request
from vstar_engine.errors import MemoryShortage
from vstar_engine.step_cache import Deep
from vstar_engine.unet import UNet

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


def inputs(device: torch.device, frames: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A step's inputs, other ones for another seed."""
    latents, timestep, context, fps, tar = step_inputs(TINY, TINY.size, frames, device, dtype)
    return [latents + seed, timestep - 40 * seed, context * (1 - 0.1 * seed), fps + seed, tar * (1 - 0.2 * seed)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_replayed_step_is_the_plain_one_to_the_bit(device, dtype, mode):
    """Plain, captured, and replayed with other values of every input; earlier results stay."""
    recorded, plain = networks(device, dtype)
    with mode():
        steps = [inputs(device, seed=seed, dtype=dtype) for seed in (0, 1, 2, 3)]
        ours = [recorded(*given) for given in steps]
        theirs = [plain(*given) for given in steps]
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[2], ours[3])
    (fixed,) = recorded.recent.values()
    assert fixed.recording.graph is not None


@torch.no_grad()
def test_steps_on_kept_features_run_plainly(device):
    recorded, plain = networks(device)
    for unet in (recorded, plain):
        unet.noise = [unet(*inputs(device, seed=seed), deep) for deep in [Deep(2)] for seed in (0, 1, 2)]
    assert all(torch.equal(mine, other) for mine, other in zip(recorded.noise, plain.noise, strict=True))
    assert not recorded.recent


@torch.no_grad()
def test_every_shape_is_recorded_and_the_last_few_are_kept(device):
    recorded, plain = networks(device)
    for frames in [*range(1, SHAPES + 2)] * 2 + [SHAPES + 1] * 2:
        given = inputs(device, frames, seed=1)
        assert torch.equal(recorded(*given), plain(*given))
    assert len(recorded.recent) == SHAPES
    # one shape too many in turn, and none comes to its second run; the last came to three
    assert [fixed.recording.runs for fixed in recorded.recent.values()] == [1] * (SHAPES - 1) + [3]
    dense = [*inputs(device, 3)[:-1], torch.rand(1, TINY.unet.levels, 3, 3, device=device)]
    assert torch.equal(recorded(*dense), plain(*dense))


@torch.no_grad()
def test_inputs_in_any_layout_and_another_call_mode(device):
    """Buffers made under inference mode may be written outside it, and views are read as they are."""
    recorded, plain = networks(device)
    with torch.inference_mode():
        recorded(*inputs(device))
    latents, timestep, context, fps, tar = inputs(device, seed=1)
    given = [latents.transpose(3, 4).contiguous().transpose(3, 4), timestep, context, fps, tar]
    assert all(torch.equal(recorded(*given), plain(*given)) for _ in range(3))


@torch.no_grad()
def test_only_the_second_run_of_a_shape_is_captured(graphs):
    recorded, _ = networks(CPU)
    counts = []
    for seed in range(4):
        recorded(*inputs(CPU, seed=seed))
        counts.append(graphs.replays)
    assert counts == [0, 1, 2, 3]
    assert recorded.nbytes == 2**20


@torch.no_grad()
def test_hooks_are_heard(device):
    """Attention maps are read by hooks, which a replay would not call."""
    recorded, _ = networks(device)
    for seed in range(3):
        recorded(*inputs(device, seed=seed))
    with analysis.recorded(recorded, [0]) as recording:
        recorded(*inputs(device))
    assert recording.passes == 1
    assert recording.attentions


def test_gradients_pass(device):
    """Noise may be optimised through the network."""
    recorded, plain = networks(device)
    found = []
    for network in (recorded, plain):
        latents, *rest = inputs(device)
        latents.requires_grad_()
        network(latents, *rest).square().sum().backward()
        found.append(latents.grad)
    assert torch.equal(*found)
    assert not recorded.recent


@torch.no_grad()
def test_a_part_of_the_network_runs_plainly(device):
    recorded, plain = networks(device)
    given, stages = inputs(device), TINY.unet.num_res_blocks + 1
    mine, theirs = Deep(stages), Deep(stages)
    for _ in range(3):
        assert torch.equal(recorded(*given, mine), plain(*given, theirs))
    assert mine.features is not None
    assert not recorded.recent


@torch.no_grad()
def test_replaced_parameters_need_a_new_recording(device):
    """A graph reads where parameters were, so what changes them all forgets it."""
    recorded, plain = networks(device)
    given = inputs(device)
    before = [recorded(*given) for _ in range(3)][-1]
    last = recorded.out[2]
    last.weight = nn.Parameter(2 * last.weight, requires_grad=False)
    plain.out[2].weight = nn.Parameter(2 * plain.out[2].weight, requires_grad=False)
    assert torch.equal(recorded(*given), before)
    assert recorded.forget()
    assert not recorded.forget()
    assert all(torch.equal(recorded(*given), plain(*given)) for _ in range(3))
    recorded.to(torch.float64)
    assert not recorded.recent


@torch.no_grad()
def test_what_is_dropped_is_freed_at_once(graphs):
    """Its memory is wanted, so nothing of it may wait for Python's collector."""
    recorded, _ = networks(CPU)
    for frames in (2, 2, 3, 3):
        recorded(*inputs(CPU, frames))
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
    given = step_inputs(recorded.spec, (32, 32), 4, "cuda", torch.float32)
    with torch.inference_mode():
        assert all(torch.equal(recorded.denoiser(*given), plain.denoiser(*given)) for _ in range(3))
    assert memory.available_bytes(torch.device("cuda")) > recorded.denoiser.nbytes > 0

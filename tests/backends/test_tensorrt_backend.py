"""How the TensorRT and AOTInductor back ends run what they loaded, over stand-ins: on whose memory, and on which GPU."""

import types
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from support import fake_graphs, fake_tensorrt
from support.engines import engine_at
from vstar_engine import Engine
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.backends import TENSORRT, backend_named, inductor, tensorrt
from vstar_engine.backends.tensorrt import ALIGNMENT, TensorrtUnet

LIBRARY = types.SimpleNamespace(
    __version__="11.4.0.0", ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED=1)
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _stream(monkeypatch):
    monkeypatch.setattr(tensorrt, "stream_of", lambda device: 0)


def at_multiple(tensor, off=0):
    """Copies a tensor to an address of the alignment that a GPU's allocator gives, or `off` bytes from it."""
    room = torch.empty(tensor.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT + off
    placed = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)


def inputs(frames=3, batch=2):
    """Every axis in full, as the network's call may give them and needs no copy of."""
    given = (
        torch.randn(batch, 4, frames, 4, 4),
        torch.randint(0, 1000, (batch, frames)),
        torch.randn(batch, frames, 77, 8),
        torch.randint(8, 30, (batch,)),
        torch.rand(batch, 2, frames),
    )
    return [at_multiple(x) for x in given]


NAMES = ("latents", "timestep", "context", "fps", "tar")


@torch.inference_mode()
def test_a_plain_call_reads_the_callers_tensors():
    engine = fake_tensorrt.Running()
    unet = TensorrtUnet(LIBRARY, engine, CPU, torch.float32)
    for _ in range(3):
        given = inputs()
        eps = unet(*given)
        (context,) = engine.contexts
        assert [context.addresses[name] for name in NAMES] == [tensor.data_ptr() for tensor in given]
        assert context.addresses["eps"] == eps.data_ptr()
        assert torch.equal(eps, fake_tensorrt.computed(*given))


UNFIT = {
    "shared row": (1, lambda x: x[:, :1]),
    "strided": (0, lambda x: at_multiple(x.transpose(3, 4)).transpose(3, 4)),
    "off the alignment": (0, lambda x: at_multiple(x, 64)),
    "another dtype": (0, lambda x: x.double()),
}


@pytest.mark.parametrize("case", UNFIT)
@torch.inference_mode()
def test_what_tensorrt_could_not_read_is_copied(case):
    index, change = UNFIT[case]
    given = inputs()
    given[index] = change(given[index])
    engine = fake_tensorrt.Running()
    eps = TensorrtUnet(LIBRARY, engine, CPU, torch.float32)(*given)
    addresses = engine.contexts[0].addresses
    kept = [addresses[name] == tensor.data_ptr() for name, tensor in zip(NAMES, given, strict=True)]
    assert kept == [place != index for place in range(5)]
    plain = [x.float() if x.dtype == torch.float64 else x for x in given]
    assert torch.equal(eps, fake_tensorrt.computed(*plain))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_a_graph_replays_on_memory_of_its_own(monkeypatch, mode):
    """Enqueued, captured, replayed twice, with other values each time; earlier results stay. Another shape has its own."""
    graphs = fake_graphs.install(monkeypatch)
    engine = fake_tensorrt.Running()
    unet = TensorrtUnet(LIBRARY, engine, CPU, torch.float32, records=True)
    with mode():
        made = [(frames, inputs(frames)) for frames in (3, 3, 3, 5, 3)]
        results = [(unet(*given), given) for _, given in made]
    for eps, given in results:
        assert torch.equal(eps, fake_tensorrt.computed(*given))
    assert graphs.replays == 3
    first, other = engine.contexts
    assert first.addresses["latents"] == unet.bound[(2, 4, 3, 4, 4)].fixed["latents"].data_ptr()
    assert not unet.bound[(2, 4, 5, 4, 4)].fixed, "nothing is kept for a shape that ran once"
    assert len(other.seen) == 2


@pytest.mark.parametrize("backend", TENSORRT)
@pytest.mark.parametrize("graphs", [True, False])
def test_steps_are_recorded_unless_that_is_declined(backend, graphs, monkeypatch, modules, tmp_path):
    module, given = backend_named(backend), []
    shaped = {"device": "cuda", "versions": {}, "options": {"plugin": "aot", "targets": []}}
    folder = engine_at(tmp_path / "e", file="unet.plan", backend=backend, **shaped)
    monkeypatch.setattr(module, "requirements", lambda device, options: {})
    modules(dict.fromkeys(("tensorrt", "tensorrt_rtx"), LIBRARY))
    monkeypatch.setattr(module, "open_plan", lambda *args: given.append(args))
    Engine.load(engine=folder, device="cpu", graphs=graphs)
    ((*_, records),) = given
    assert records is graphs


@pytest.fixture
def guards(monkeypatch):
    """The devices that were made current and are, in turn."""
    held = []

    @contextmanager
    def device(here):
        held.append(here)
        yield
        held.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return held


def test_another_gpu_than_the_current_one_is_made_current(guards):
    second = torch.device("cuda", 1)
    engine = fake_tensorrt.Running(guards)
    unet = TensorrtUnet(LIBRARY, engine, CPU, torch.float32)
    unet.device = second
    unet(*inputs())
    assert engine.contexts[0].seen == [(second,), (second,)], "while it was bound and while it was enqueued"
    assert guards == []


@pytest.mark.parametrize(("device", "index"), [("cuda:0", 0), ("cuda:1", 1), ("cuda", -1), ("cpu", -1)])
def test_a_package_runs_on_the_gpu_that_was_asked_for(device, index, guards, monkeypatch, tmp_path):
    device, asked, seen = torch.device(device), [], []

    def package(**given):
        seen.extend(guards)
        return given["latents"]

    def load(path, device_index):
        asked.append(device_index)
        return package

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    denoise = inductor.load(BuiltEngine.open(engine_at(tmp_path / "e")), device=device, dtype=torch.float32)
    given = inputs()
    assert denoise(*given) is given[0], "nothing that fits is copied"
    assert asked == [index]
    assert seen == ([device] if device.type == "cuda" else [])

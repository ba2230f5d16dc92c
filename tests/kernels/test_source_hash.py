"""What an engine's identity and the kernels' own hash are made of."""

from pathlib import Path

import pytest
import torch

from vstar_engine.artifacts.source_hash import ROOMS
from vstar_engine.config.models import MODELS
from vstar_engine.export.build_settings import Settings
from vstar_engine.kernels.source_hash import kernel_hash
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae

SPEC = MODELS["mini"]


@pytest.fixture
def changed(monkeypatch):
    """A call that changes what is read of the files that it picks."""
    plain = Path.read_bytes
    return lambda picks: monkeypatch.setattr(Path, "read_bytes", lambda path: plain(path) + b"#" * picks(path))


def identity():
    return Settings(SPEC, "inductor").identity("0", {}, {})


@pytest.mark.parametrize(
    ("name", "shapes", "of_kernels"),
    [
        ("unet.py", True, False),
        ("layers.py", True, False),
        ("onnx_function.py", True, False),
        ("temporal_attention_launch.py", True, True),
        ("main.py", False, False),
    ],
)
def test_an_engine_is_of_every_source_that_shapes_it(changed, name, shapes, of_kernels):
    """Timings and plugins are of the kernels alone."""
    engine, kernels = identity(), kernel_hash()
    changed(lambda path: path.name == name)
    assert (identity() != engine, kernel_hash() != kernels) == (shapes, of_kernels)


def test_no_file_of_the_networks_is_forgotten():
    with torch.device("meta"):
        networks = UNet(SPEC.unet), Vae(SPEC.vae), TextTower(SPEC.text)
    used = {type(module).__module__ for network in networks for module in network.modules()}
    ours = {name for name in used if name.startswith("vstar_engine.")}
    assert all(name.startswith(ROOMS) for name in ours)


def test_files_of_one_name_in_two_folders_are_both_hashed(changed):
    """A launcher bears its op's name."""
    engine = identity()
    for room in ("kernels", "networks"):
        changed(lambda path, room=room: path.parent.name == room)
        assert identity() != engine

"""Engines without a library behind them, for tests of what surrounds one."""

import torch

from vstar_engine import Engine
from vstar_engine.artifacts.built_engine import KIND, name_of
from vstar_engine.artifacts.manifest import write_manifest
from vstar_engine.artifacts.source_hash import engine_hash
from vstar_engine.backends import backend_named
from vstar_engine.config.models import MODELS
from vstar_engine.loading import LoadedModel
from vstar_engine.weights import checkpoint
from vstar_engine.weights.bundled import weights

FACTS = {"unet": {"inputs": [{"name": "context", "shape": ["texts", "batch", "frames", 77, 64]}]}}


def engine_like(engine, **changed):
    """An engine with some of another's parts changed."""
    return Engine(LoadedModel(**{**vars(engine), **changed}))


def identity(**changed):
    """An identity that fits this machine and the mini model's weights."""
    return {
        "model": "mini",
        "backend": "inductor",
        "dtype": "float32",
        "frames": [],
        "size": [32, 64],
        "batch": 2,
        "weights": checkpoint.Weights(weights(MODELS["mini"])).fingerprint(),
        "sources": engine_hash(),
        **backend_named("inductor").requirements(torch.device("cpu"), {}),
        "options": {},
        **changed,
    }


def engine_at(folder, file="unet.pt2", facts=None, content=bytes(range(256)), **changed):
    """Makes a folder that looks like a built engine; its one file is no package."""
    folder.mkdir(mode=0o700, parents=True)
    (folder / file).write_bytes(content)
    shaped = identity(**changed)
    about = {
        "name": name_of(shaped),
        "identity": shaped,
        "facts": FACTS if facts is None else facts,
        "weights_path": None,
        "loras": [],
        "made": "today",
        "seconds": 1.0,
        "peak_memory": 2**30,
    }
    write_manifest(folder, {"kind": KIND, **about})
    return folder

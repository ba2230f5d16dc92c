"""A checkpoint of VideoCrafter2's full size through convert, load and one forward; run by `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vstar_engine.config.models import MODELS
from vstar_engine.weights.key_map import official_shapes

FORWARD = """
import json, sys, time, torch
from vstar_engine import Engine
peaks = {}
def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
peaks["before"], start = peak(), time.perf_counter()
engine = Engine.load("videocrafter2", sys.argv[1], dtype="float16")
peaks["loaded"], peaks["seconds"] = peak(), time.perf_counter() - start
modules = (engine.text, engine.vae, engine.denoiser)
peaks["weights"] = sum(p.nbytes for module in modules for p in module.parameters())
engine.denoiser.float()
generator = torch.Generator().manual_seed(1)
latents, context = torch.randn(1, 4, 4, 8, 16, generator=generator), torch.randn(1, 4, 77, 1024, generator=generator)
given = [latents, torch.tensor([[481]]), context, torch.tensor([28]), torch.zeros(1, 4, 4)]
with torch.inference_mode():
    outs = [engine.denoiser(*given) for _ in range(2)]
peaks |= {"finite": bool(outs[0].isfinite().all()), "same": torch.equal(*outs), "std": float(outs[0].std()), "forward": peak()}
peaks["unused"] = len(engine.unused)
print(json.dumps(peaks))
"""


def test_every_key_and_shape_is_the_official_one():
    listed = json.loads((Path(__file__).parent / "videocrafter2_keys.json").read_text())
    ours = official_shapes(MODELS["videocrafter2"])
    assert ours.keys() == listed.keys()
    assert {name: list(shape) for name, shape in ours.items()} == listed


@pytest.mark.slow
def test_full_size_converts_loads_and_runs(tmp_path):
    def run(*words):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "vstar_engine.weights.random_checkpoint", "videocrafter2", str(tmp_path / "model.ckpt"))
    assert 3.69e9 < (tmp_path / "model.ckpt").stat().st_size < 3.72e9
    print(run("-m", "vstar_engine", "convert", str(tmp_path / "model.ckpt"), str(tmp_path / "weights")))
    found = json.loads(run("-c", FORWARD, str(tmp_path / "weights")))
    print(found)
    assert found["finite"]
    assert found["same"]
    assert found["std"] > 0
    assert found["unused"] == 122 + 13
    assert found["loaded"] - found["before"] <= 1.25 * found["weights"]

"""Whole pipelines of tiny towers: ModelScope's and Wan 2.2's, with a dial and a timeline on."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from support.tiny_pipelines import model_scope, wan_pipeline
from vstar_engine.config.sampling import Tar
from vstar_engine.integrations.diffusers import dial, timeline

TIMELINE = ["a boy lies in bed", ("0.25s", "he jumps"), (1.0, "he runs")]


@pytest.fixture(scope="module", params=["model_scope", "wan"])
def made(request):
    """A pipeline, a function that runs it to latents, and a dial's settings for it."""
    if request.param == "model_scope":
        pipe, sizes, settings = model_scope(), {"height": 16, "width": 16, "num_frames": 5}, {"tar": Tar({0: 1.0, 1: 2.0})}
    else:
        pipe, sizes, settings = wan_pipeline(), {"height": 32, "width": 32, "num_frames": 9}, {"reference": 0.3}

    def run(*prompt, **texts):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent", **sizes}
        return pipe(*prompt, **texts, **options, generator=generator).frames

    return pipe, run, settings


def processors(pipe):
    models = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    return [processor for model in models if model is not None for processor in model.attn_processors.values()]


def test_a_dial_acts_until_it_is_off(made):
    pipe, run, settings = made
    plain, before = run("a boy"), processors(pipe)
    with dial(pipe, **settings, until=0.5) as on:
        half = run("a boy")
        assert {line.denoiser for line in on.report().layers} <= {"unet", "transformer", "transformer_2"}
    with dial(pipe, **settings, until=0.0):
        assert torch.equal(run("a boy"), plain)
    with dial(pipe, **settings, until=1.0):
        whole = run("a boy")
    assert all(a is b for a, b in zip(processors(pipe), before, strict=True))
    assert torch.equal(run("a boy"), plain)
    differences = [(a - b).abs().max() for a, b in ((plain, half), (half, whole))]
    assert min(differences) > 1e-4, "each half of the steps counts, those of either expert"


def test_a_timeline_runs_a_pipeline(made):
    pipe, run, settings = made
    plain = run(["a boy", "he runs"])
    with timeline(pipe, TIMELINE, transition="0.1s") as on:
        moving = run(**on.texts("blurry"))
        with dial(pipe, **settings):
            both = run(**on.texts("blurry"))
        with pytest.raises(ValueError, match="a timeline of 3 states is on"):
            run("a boy")
    with timeline(pipe, ["a boy"] * 3) as on:
        same = run(**on.texts())
    assert torch.equal(run(["a boy", "he runs"]), plain)
    torch.testing.assert_close(same, run("a boy"), rtol=0, atol=1e-4)
    assert (moving - same).abs().max() > 1e-4
    assert (moving - both).abs().max() > 1e-4


def test_the_documents_lines_run(tmp_path):
    """The page's first lines, with a tiny folder in the place of the model's name."""
    pytest.importorskip("accelerate", reason="needs accelerate, by which diffusers loads a Wan")
    page = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    wan_pipeline(experts=1).save_pretrained(tmp_path)
    for said, here in (
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", str(tmp_path)),
        (', torch_dtype=torch.bfloat16).to("cuda")', ")"),
        ("num_frames=161", "num_frames=33, height=32, width=32, num_inference_steps=2"),
        ("trained_frames=21", "trained_frames=3"),
        ('"3s"', '"0.5s"'),
        ('"7s"', '"1.2s"'),
    ):
        assert said in lines
        lines = lines.replace(said, here)
    names = {}
    exec(lines, names)
    assert names["video"].shape == (33, 32, 32, 3)

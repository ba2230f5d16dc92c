"""The bundled model in diffusers' layout: VSTAR's rule and a timeline there make the engine's own video."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from diffusers import DiffusionPipeline

# diffusers loads a scheduler of ours only where its module was imported
from vstar_engine.integrations.diffusers.rescaled_ddim import RescaledDDIMScheduler

# isort: split
from vstar_engine import Engine, Sampling, Tar
from vstar_engine.config.models import MODELS
from vstar_engine.errors import ExportError, OutputError
from vstar_engine.export.to_diffusers import to_diffusers
from vstar_engine.integrations.diffusers import dial, timeline
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling.schedule import Schedule
from vstar_engine.weights import bundled
from vstar_engine.weights.checkpoint import Weights

SPEC, FRAMES, STEPS, SEED = MODELS["mini"], 6, 3, 3
STATES = ["a tree in spring", "a tree in summer", "a tree in winter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusers") / "mini"
    to_diffusers(SPEC, Weights(bundled.weights(SPEC)), path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def run(pipe, **texts):
    latents = torch.randn(1, 4, FRAMES, 8, 12, generator=torch.Generator().manual_seed(SEED))
    sizes = {"num_frames": FRAMES, "height": 64, "width": 96, "latents": latents}
    made = pipe(**texts, **sizes, num_inference_steps=STEPS, guidance_scale=6.0, eta=0.0, output_type="np").frames[0]
    return torch.from_numpy(made * 255).round().int()


def test_tar_and_a_timeline_make_the_engines_frames(pipe):
    """Latents given, eta 0: within 1 of 255, and TAR changes the video by far more."""
    assert isinstance(pipe.scheduler, RescaledDDIMScheduler)
    sampling, tar = Sampling(steps=STEPS, eta=0.0, guidance=6.0), Tar({0: 1.0, 1: 8.0}, until_step=1)
    engine = Engine.load("mini", backend="eager", device="cpu", dtype="float32")
    options = {"frames": FRAMES, "seed": SEED, "size": (64, 96), "sampling": sampling}
    ours = torch.as_tensor(engine.generate(STATES, tar=tar, **options).frames).int()
    with timeline(pipe, STATES) as states:
        texts = states.texts()
        with dial(pipe, tar=tar) as on:
            theirs = run(pipe, **texts)
            assert {line.rule.split(",")[1] for line in on.report().layers} == {" level 0", " level 1"}
        plain = run(pipe, **texts)
    assert (theirs - ours).abs().max() <= 1
    assert (plain - ours).abs().max() > 10


def test_the_tokenizer_is_the_engines(pipe):
    prompt = "A red ball, it's blue sky -- 24 clouds."
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=77).input_ids
    assert tokens == tokenize([prompt])[0].tolist()


@pytest.mark.parametrize(("steps", "eta"), [(4, 1.0), (7, 0.0)])
def test_the_scheduler_steps_as_the_engine(steps, eta):
    scheduler, schedule = RescaledDDIMScheduler(), Schedule.ddim(steps, eta=eta)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == schedule.timesteps[::-1].tolist()
    torch.manual_seed(0)
    sample, predicted = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    for i, timestep in reversed(list(enumerate(schedule.timesteps))):
        alpha, before, sigma = schedule.alpha[i], schedule.alpha_prev[i], schedule.sigma[i]
        clean = (sample - (1 - alpha) ** 0.5 * predicted) / (alpha**0.5 * schedule.scale[i])
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        wanted = before**0.5 * schedule.scale_prev[i] * clean + (1 - before - sigma**2) ** 0.5 * predicted + sigma * noise
        got = scheduler.step(predicted, timestep, sample, eta=eta, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(got.prev_sample, wanted)
        torch.testing.assert_close(got.pred_original_sample, clean)
        sample = got.prev_sample


def test_what_is_missing_is_refused(folder, tmp_path):
    weights = dict(Weights(bundled.weights(SPEC)))
    with pytest.raises(OutputError, match="exists"):
        to_diffusers(SPEC, weights, folder)
    weights.pop("model.diffusion_model.out.2.weight")
    with pytest.raises(ExportError, match=r"unet: 1 tensors are missing, unknown or of another size, such as conv_out\.weight"):
        to_diffusers(SPEC, weights, tmp_path / "other")
    assert not any(tmp_path.iterdir())

"""The guider in a modular Wan pipeline: the dial that `dial` puts on, with the step that the loop gives."""

import json

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import WanBlocks

from support.tiny_pipelines import wan_pipeline
from vstar_engine.integrations.diffusers import DialSettings, dial
from vstar_engine.integrations.diffusers.guider import DialGuidance

SETTINGS = DialSettings(reference=0.3, until=0.5)


@pytest.fixture(scope="module")
def modular():
    whole = wan_pipeline(experts=1)
    pipe = WanBlocks().init_pipeline()
    pipe.update_components(
        **{name: getattr(whole, name) for name in ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, guider):
    pipe.update_components(guider=guider)
    generator = torch.Generator().manual_seed(0)
    sizes = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4}
    return pipe(prompt="a boy", generator=generator, output="latents", **sizes)


def test_it_is_the_dial_with_the_loops_step(modular):
    before = dict(modular.transformer.attn_processors)
    ours = run(modular, DialGuidance(SETTINGS.to_json(), guidance_scale=5.0))
    assert all(modular.transformer.attn_processors[name] is kept for name, kept in before.items())
    plain = run(modular, ClassifierFreeGuidance(guidance_scale=5.0))
    with dial(modular, reference=SETTINGS.reference, until=SETTINGS.until):
        hooked = run(modular, ClassifierFreeGuidance(guidance_scale=5.0))
    assert torch.equal(ours, hooked)
    assert (ours - plain).abs().max() > 1e-4


def test_it_is_saved_and_loaded_as_a_guider(tmp_path):
    DialGuidance(SETTINGS.to_json(), guidance_scale=5.0).save_pretrained(tmp_path)
    loaded = DialGuidance.from_pretrained(tmp_path)
    assert (loaded.settings, loaded.guidance_scale) == (SETTINGS, 5.0)
    with pytest.raises(ValueError, match="a dial's settings are"):
        DialGuidance(json.dumps({"speed": 1}))

import torch

from vstar_engine.config.models import VaeSpec
from vstar_engine.networks.vae import Vae

SPEC = VaeSpec(channels=32, channel_mult=(1, 2), num_res_blocks=1)


def test_decoding_in_chunks_changes_nothing():
    vae, latents = Vae(SPEC).eval(), torch.randn(2, 4, 5, 4, 6)
    with torch.no_grad():
        whole, parts = vae.decode(latents, chunk=100), vae.decode(latents, chunk=3)
    assert whole.shape == (2, 3, 5, 8, 12)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-5)


def test_encode_gives_the_scaled_mode():
    vae, pixels = Vae(SPEC).eval(), torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        mean, logvar = vae.posterior(pixels)
        assert torch.equal(vae.encode(pixels), SPEC.scale_factor * mean)
    assert logvar.abs().max() <= 30
    assert mean.shape == (2, 4, 4, 6)

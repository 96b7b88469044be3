"""The lossless autoencoder: exact round trip, the interface pipelines ask for, its guards."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder


def test_round_trip_is_exact_and_half_the_side():
    pictures = torch.rand(2, 3, 8, 12) * 2 - 1
    vae = PixelUnshuffleAutoencoder()
    latents = vae.encode(pictures).latent_dist.sample()
    assert latents.shape == (2, 12, 4, 6)
    torch.testing.assert_close(vae.decode(latents).sample, pictures, rtol=0, atol=1e-6)


def test_tuple_results_equal_the_objects():
    pictures = torch.rand(1, 3, 4, 4)
    vae = PixelUnshuffleAutoencoder()
    (distribution,) = vae.encode(pictures, return_dict=False)
    assert torch.equal(distribution.mode(), vae.encode(pictures).latent_dist.mode())
    (decoded,) = vae.decode(distribution.mode(), return_dict=False)
    assert torch.equal(decoded, vae.decode(distribution.mode()).sample)


def test_shift_and_factor_come_back_from_disk(tmp_path):
    vae = PixelUnshuffleAutoencoder(block_out_channels=(1, 1, 1), latent_channels=48, shift=0.25)
    vae.save_pretrained(tmp_path)
    again = PixelUnshuffleAutoencoder.from_pretrained(tmp_path)
    pictures = torch.rand(1, 3, 8, 8)
    assert again.factor == 4
    assert torch.equal(again.encode(pictures).latent_dist.mode(), vae.encode(pictures).latent_dist.mode())


def test_channels_that_do_not_follow_from_the_stages_are_refused():
    with pytest.raises(ValueError, match="12 latent channels"):
        PixelUnshuffleAutoencoder(latent_channels=4)


def test_slicing_and_tiling_are_switches_that_change_no_picture():
    vae = PixelUnshuffleAutoencoder()
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    before = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    vae.enable_slicing()
    vae.enable_tiling()
    assert (vae.use_slicing, vae.use_tiling) == (True, True)
    assert torch.equal(vae.decode(vae.encode(pictures).latent_dist.mode()).sample, before)
    vae.disable_slicing()
    vae.disable_tiling()
    assert (vae.use_slicing, vae.use_tiling) == (False, False)


def test_a_pipeline_turns_them_on(tiny_model_dir):
    """As with any learned autoencoder, by the pipeline's own calls or the autoencoder's."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        str(tiny_model_dir / "base"), vae=PixelUnshuffleAutoencoder(), add_watermarker=False
    )
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    assert pipeline.vae.use_tiling
    assert pipeline.vae.use_slicing

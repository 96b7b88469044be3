"""Pretraining of the embedded base: batches, weights of the loss, budget, export; a few real steps of both parts."""

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from data_pipeline.world.renderings import RenderingSettings, load_or_render
from msdiffusion.errors import WeightsError
from msdiffusion.training import pretrain
from msdiffusion.training.embedded.pools import SceneCaptions, prepare_views
from msdiffusion.training.local_sgd import WeightAveraging
from msdiffusion.training.pretrain import ImageEncoderPretraining, TextToImagePretraining, WorldRenderings


@pytest.fixture(scope="module")
def renderings(tmp_path_factory):
    settings = RenderingSettings(scenes=24, identities=20, views=2, shares=(0.3, 0.4, 0.3))
    return load_or_render(settings, tmp_path_factory.mktemp("renderings"), workers=1)


def trainer(folder, **settings):
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[WeightAveraging()],
        **settings,
    )


def test_batches_hold_pictures_boxes_and_tokens(renderings):
    batch = SceneCaptions(renderings).__getitems__(list(range(8)))
    assert batch["images"].shape == (8, 3, 64, 64)
    assert batch["images"].dtype == torch.uint8
    assert batch["boxes"].shape == (8, 3, 4)
    assert batch["tokens"].shape == (8, 40)
    assert ((batch["boxes"] >= 0) & (batch["boxes"] <= 1)).all()


def test_mirrored_boxes_stay_on_their_subjects(renderings):
    """The subject's pixels, found by their difference from the unmirrored picture's column order, follow the box."""
    data = SceneCaptions(renderings)
    batch = data.__getitems__(list(range(24)))
    for row in range(24):
        picture = batch["images"][row].permute(1, 2, 0).numpy()
        stored = renderings.images[row]
        flipped = not np.array_equal(picture, stored)
        if flipped:
            assert np.array_equal(picture, stored[:, ::-1])
        x1, x2 = batch["boxes"][row, 0, 0].item(), batch["boxes"][row, 0, 2].item()
        a, b = renderings.boxes[row, 0, 0], renderings.boxes[row, 0, 2]
        assert (x1, x2) == pytest.approx((1 - b, 1 - a) if flipped else (a, b), abs=1e-6)


def test_box_weights_cover_exactly_the_box(tmp_path):
    model = TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 32), box_weight=4.0)
    boxes = torch.tensor([[[0.25, 0.5, 0.75, 1.0], [0, 0, 0, 0]]])
    weights = model.box_weights(boxes, 8)
    expected = torch.ones(1, 8, 8)
    expected[:, 4:, 2:6] = 4
    assert torch.equal(weights, expected)


def test_text_to_image_trains_exports_and_resumes_its_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_samples", lambda *_: None)  # tested below
    model = TextToImagePretraining(output=str(tmp_path / "base"), channels=(32, 32, 32), max_steps=3, warmup_steps=1)
    before = model.unet.conv_in.weight.clone()
    data = WorldRenderings(scenes=24, identities=20, batch_size=8, cache=str(tmp_path / "cache"))
    settings = RenderingSettings(24, 20, 2)
    monkeypatch.setattr(
        pretrain, "load_or_render", lambda _settings, cache, workers: load_or_render(settings, cache, workers)
    )
    runner = trainer(tmp_path, max_steps=3)
    runner.fit(model, data)
    assert runner.global_step == 3
    assert not torch.equal(before, model.unet.conv_in.weight)
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    assert index["vae"] == ["msdiffusion.pixel_autoencoder", "PixelUnshuffleAutoencoder"]
    runner.save_checkpoint(tmp_path / "last.ckpt")
    again = TextToImagePretraining(output=str(tmp_path / "base"), channels=(32, 32, 32), max_steps=5)
    resumed = trainer(tmp_path, max_steps=5)
    resumed.fit(again, data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step == 5
    assert again.elapsed > model.elapsed
    assert not (tmp_path / "base.1").exists()  # it goes on with its own, and moves nothing aside
    other = TextToImagePretraining(output=str(tmp_path / "base"), channels=(32, 32, 32), max_steps=1)
    trainer(tmp_path, max_steps=1).fit(other, data)
    assert (tmp_path / "base.1").is_dir()


def test_samples_are_drawn_for_fixed_prompts(tmp_path):
    from PIL import Image

    model = TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 32))
    pretrain.draw_samples(model.pipeline, tmp_path / "grid.png", count=2, steps=1)
    assert Image.open(tmp_path / "grid.png").size == (8 * 128, 128)
    assert len((tmp_path / "grid.txt").read_text().splitlines()) == 2


def test_image_encoder_learns_to_tell_identities_apart(tmp_path, renderings):
    torch.manual_seed(0)
    model = ImageEncoderPretraining(output=str(tmp_path))
    batch = pretrain.IdentityViews(renderings, 2).__getitems__(list(range(16)))
    optimizer = model.configure_optimizers()
    model.set_learning_rate = lambda *_: None
    model.log = model.log_dict = lambda *_, **__: None
    losses = []
    for _ in range(8):
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_views_are_on_white_and_augmentation_stays_in_the_frame(renderings):
    views = torch.from_numpy(renderings.views[:4].copy())
    plain = prepare_views(views, augment=False)
    white = prepare_views(torch.zeros_like(views), augment=False)
    assert torch.allclose(plain[0, :, 0, 0], white[0, :, 0, 0])
    torch.manual_seed(0)
    moved = prepare_views(views, augment=True)
    assert moved.shape == plain.shape
    assert torch.isfinite(moved).all()
    # The drawing shrinks but is not cut: some of it must remain.
    assert (moved.flatten(1).std(1) > 0.1).all()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="scenes or identities"):
        WorldRenderings(kind="videos")


def test_a_run_can_go_on_from_a_saved_base(tmp_path):
    first = TextToImagePretraining(output=str(tmp_path / "base"), channels=(32, 32, 32))
    first.pipeline.save_pretrained(tmp_path / "base")
    second = TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 32), initial=str(tmp_path / "base"))
    for name in ("unet", "text_encoder", "text_encoder_2"):
        there, here = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert all(torch.equal(there[key], here[key]) for key in there)
    assert torch.equal(second.average["unet.conv_in.weight"], first.unet.conv_in.weight)


def test_a_base_of_another_architecture_is_refused(tmp_path):
    TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 32)).pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(WeightsError, match="holds no base of this architecture"):
        TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 64), initial=str(tmp_path / "base"))
    with pytest.raises(WeightsError, match="holds no base"):
        TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 32), initial=str(tmp_path / "nothing"))


@pytest.mark.parametrize(("factor", "channels"), [(2, (32, 32, 32)), (4, (32, 32))])
def test_other_latents_train_too(tmp_path, renderings, factor, channels):
    model = TextToImagePretraining(output=str(tmp_path), channels=channels, latent_factor=factor)
    batch = SceneCaptions(renderings).__getitems__([0, 1])
    errors, naming = model.denoising_errors(batch, torch.tensor([100, 900]))
    assert errors.shape == (2, 64 // factor, 64 // factor)
    assert errors.isfinite().all() and naming.isfinite()


def test_latents_that_never_get_coarse_have_no_attention(tmp_path):
    with pytest.raises(ValueError, match="no attention"):
        TextToImagePretraining(output=str(tmp_path), channels=(32,), latent_factor=2)


@pytest.mark.parametrize("factor", [0, 3, 128])
def test_latents_need_a_power_of_two(tmp_path, factor):
    with pytest.raises(ValueError, match=f"power of two that divides 64, got {factor}"):
        TextToImagePretraining(output=str(tmp_path), channels=(32, 32), latent_factor=factor)


def test_noise_of_a_generator_repeats(tmp_path, renderings):
    model = TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 32)).eval()
    batch = SceneCaptions(renderings).__getitems__([0, 1])
    draws = [
        model.denoising_errors(batch, torch.tensor([500, 500]), torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_weights_inside_alone_leave_the_background_out(tmp_path):
    model = TextToImagePretraining(output=str(tmp_path), channels=(32, 32, 32))
    inside = model.box_weights(torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]), 4, 1.0, 0.0)
    assert inside.sum() == 4
    assert (inside[0, :2, :2] == 1).all()

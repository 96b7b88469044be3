import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.training.objective import (
    DropRates,
    draw_drops,
    draw_timesteps,
    prediction_target,
    subject_area,
    training_schedule,
    weighted_error,
)


def test_drops_come_at_their_rates():
    count = 200_000
    image, text, grounding = draw_drops(DropRates(), count, torch.Generator().manual_seed(0))
    rates = {
        "image alone": (image & ~text).float().mean(),
        "text alone": (text & ~image).float().mean(),
        "both": (image & text).float().mean(),
    }
    for name, rate in rates.items():
        assert rate == pytest.approx(0.05, abs=0.003), name
    assert grounding.float().mean() == pytest.approx(0.10, abs=0.004)
    # independent of the others: a tenth of the samples without an image, too
    assert grounding[image].float().mean() == pytest.approx(0.10, abs=0.01)


def test_drops_can_be_switched_off_and_forced():
    off = draw_drops(DropRates(image=0, text=0, both=0, grounding=0), 1000)
    assert not any(drop.any() for drop in off)
    forced = draw_drops(DropRates(image=0, text=0, both=1, grounding=1), 1000)
    assert all(drop.all() for drop in forced)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"image": -0.1}, r"drop_image must be in \[0, 1\], got -0.1"),
        ({"grounding": 1.1}, "drop_grounding must be in"),
        ({"image": 0.5, "text": 0.4, "both": 0.3}, r"must not exceed 1, got 0.5 \+ 0.4 \+ 0.3"),
    ],
)
def test_impossible_drop_rates_are_refused(rates, message):
    with pytest.raises(RequestError, match=message):
        DropRates(**rates)


def test_timesteps_are_uniform_or_tilted():
    generator = torch.Generator().manual_seed(0)
    uniform = draw_timesteps(100_000, 1000, generator=generator)
    assert (uniform.min(), uniform.max()) == (0, 999)
    assert uniform.float().mean() == pytest.approx(499.5, abs=4)
    noisy = draw_timesteps(100_000, 1000, exponent=0.5, generator=generator)
    assert noisy.max() == 999
    assert noisy.float().mean() == pytest.approx(666, abs=4)  # the mean of u ** .5 is 2 / 3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_schedule_is_ddpm_with_the_bases_betas(sampler, prediction):
    base = sampler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.02, prediction_type=prediction)
    schedule = training_schedule(base)
    assert isinstance(schedule, DDPMScheduler)
    assert schedule.config.prediction_type == prediction
    torch.testing.assert_close(schedule.alphas_cumprod, base.alphas_cumprod)


def test_a_base_that_predicts_the_picture_is_refused():
    with pytest.raises(WeightsError, match="predicts 'sample'"):
        training_schedule(DDIMScheduler(prediction_type="sample"))


def test_epsilon_target_is_the_noise():
    schedule = training_schedule(DDIMScheduler())
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert prediction_target(schedule, latents, noise, torch.tensor([0, 999])) is noise


def test_velocity_target_gives_back_picture_and_noise():
    schedule = training_schedule(DDIMScheduler(prediction_type="v_prediction"))
    latents, noise = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    timesteps = torch.tensor([10, 500, 900])
    velocity = prediction_target(schedule, latents, noise, timesteps)
    noisy = schedule.add_noise(latents, noise, timesteps)
    signal = schedule.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - schedule.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(signal * noisy - sigma * velocity, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sigma * noisy + signal * velocity, noise, rtol=1e-4, atol=1e-5)


def test_area_covers_the_boxes_and_no_padding():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]], [[0.5, 0.5, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0]]])
    area = subject_area(boxes, 2, 4)
    assert area.shape == (2, 1, 2, 4)
    assert area[:, 0].tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]]


def test_weights_of_one_give_the_plain_mean():
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(weighted_error(prediction, target, torch.ones(2, 1, 4, 4)), expected)


def test_weights_move_the_attention():
    target = torch.zeros(1, 2, 1, 2)
    prediction = torch.tensor([1.0, 3.0]).expand(1, 2, 1, 2)  # errors 1 and 9
    assert weighted_error(prediction, target, torch.tensor([[[[1.0, 3.0]]]])) == pytest.approx((1 + 27) / 4)
    assert weighted_error(prediction, target, torch.tensor([[[[1.0, 0.0]]]])) == pytest.approx(1)


def test_half_precision_predictions_are_compared_in_float32():
    prediction = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)  # its square overflows float16
    error = weighted_error(prediction, torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 64, 64))
    assert error.dtype == torch.float32
    assert error == pytest.approx(90_000)

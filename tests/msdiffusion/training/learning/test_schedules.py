"""Noise of the bases' kinds, held to diffusers' own schedulers; min-SNR weights, held to the error of the picture."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.training.learning.schedules import DiffusionSchedule, FlowSchedule, draw_shares, training_schedule


def noise_and_latents(count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 3, 4, 4, generator=generator).unbind()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_schedule_is_ddpm_with_the_bases_betas(sampler, prediction):
    base = sampler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.02, prediction_type=prediction)
    schedule = training_schedule(base)
    assert isinstance(schedule, DiffusionSchedule)
    assert isinstance(schedule.scheduler, DDPMScheduler)
    assert schedule.prediction == prediction
    assert schedule.num_timesteps == 1000
    torch.testing.assert_close(schedule.scheduler.alphas_cumprod, base.alphas_cumprod)


def test_an_unknown_prediction_is_refused():
    base = DDIMScheduler()
    base.register_to_config(prediction_type="score")
    with pytest.raises(WeightsError, match="predicts 'score'"):
        training_schedule(base)


def test_epsilon_target_is_the_noise_and_sample_target_the_latents():
    latents, noise = noise_and_latents(2)
    timesteps = torch.tensor([0, 999])
    assert training_schedule(DDIMScheduler()).target(latents, noise, timesteps) is noise
    assert training_schedule(DDIMScheduler(prediction_type="sample")).target(latents, noise, timesteps) is latents


def test_velocity_target_gives_back_picture_and_noise():
    schedule = training_schedule(DDIMScheduler(prediction_type="v_prediction"))
    latents, noise = noise_and_latents()
    timesteps = torch.tensor([10, 500, 900])
    velocity = schedule.target(latents, noise, timesteps)
    torch.testing.assert_close(velocity, DDIMScheduler().get_velocity(latents, noise, timesteps))
    noisy = schedule.noisy(latents, noise, timesteps)
    torch.testing.assert_close(noisy, DDIMScheduler().add_noise(latents, noise, timesteps))
    signal = schedule.scheduler.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - schedule.scheduler.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(signal * noisy - sigma * velocity, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sigma * noisy + signal * velocity, noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_that_of_the_bases_sampler(sampler, shift):
    base = sampler(shift=shift)
    schedule = training_schedule(base)
    assert isinstance(schedule, FlowSchedule)
    # the sampler's timesteps are shifted ones: those of shares 1, 999 / 1000, ...
    drawn = schedule.timesteps(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000)
    torch.testing.assert_close(drawn, base.timesteps, rtol=1e-5, atol=1e-3)
    latents, noise = noise_and_latents()
    timesteps = base.timesteps[[10, 500, 900]]
    noisy = schedule.noisy(latents, noise, timesteps)
    if sampler is FlowMatchEulerDiscreteScheduler:
        torch.testing.assert_close(noisy, base.scale_noise(latents, timesteps, noise))
        # one step of the sampler along the true flow, from the first timestep to the end, arrives at the picture
        base.set_timesteps(1)
        start = schedule.noisy(latents, noise, base.timesteps.expand(3))
        flow = schedule.target(latents, noise, base.timesteps.expand(3))
        torch.testing.assert_close(base.step(flow, base.timesteps[0], start).prev_sample, latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_samplers_of_diffusion_may_be_set_to_flows(sampler):
    base = sampler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.5)
    schedule = training_schedule(base)
    assert isinstance(schedule, FlowSchedule)
    assert schedule.shift == 2.5
    base.set_timesteps(10)
    latents, noise = noise_and_latents(1)
    start = base.timesteps[3:4]
    noisy = schedule.noisy(latents, noise, base.sigmas[3:4] * 1000)
    base._step_index = 3
    torch.testing.assert_close(
        base.convert_model_output(schedule.target(latents, noise, start), sample=noisy), latents, atol=1e-5, rtol=1e-5
    )


def test_flows_that_training_does_not_know_are_refused():
    with pytest.raises(WeightsError, match=r"sigmas of flow matching but predicts 'epsilon'.*scheduler_config\.json"):
        training_schedule(UniPCMultistepScheduler(use_flow_sigmas=True))
    with pytest.raises(WeightsError, match="shifts its timesteps by the resolution"):
        training_schedule(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_formula(prediction):
    """As diffusers' own training scripts compute them."""
    schedule = training_schedule(DDIMScheduler(prediction_type=prediction))
    timesteps = torch.tensor([0, 100, 400, 700, 999])
    snr = compute_snr(schedule.scheduler, timesteps)
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]
    expected = expected / (snr if prediction == "epsilon" else snr + 1)
    weights = schedule.min_snr_weights(timesteps, 5.0)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("base", [
    DDIMScheduler(), DDIMScheduler(prediction_type="v_prediction"), DDIMScheduler(prediction_type="sample"),
    FlowMatchEulerDiscreteScheduler(),
], ids=["epsilon", "v_prediction", "sample", "flow"])  # fmt: skip
def test_min_snr_weighs_the_error_of_the_picture_alike_for_every_prediction(base):
    """A wrong picture, said in whichever way, costs min(SNR, gamma) times its square error."""
    schedule = training_schedule(base)
    latents, noise = (part.double() for part in noise_and_latents(4))
    timesteps = torch.tensor([50, 300, 600, 950])
    flow = isinstance(schedule, FlowSchedule)
    share = timesteps.double() / 1000
    signal = (1 - share) if flow else schedule.scheduler.alphas_cumprod[timesteps].double().sqrt()
    sigma = share if flow else (1 - schedule.scheduler.alphas_cumprod[timesteps].double()).sqrt()
    column = (-1, 1, 1, 1)
    noisy = signal.view(column) * latents + sigma.view(column) * noise
    wrong = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wrong_noise = (noisy - signal.view(column) * wrong) / sigma.view(column)
    error = (schedule.target(wrong, wrong_noise, timesteps) - schedule.target(latents, noise, timesteps)).square()
    snr = (signal / sigma).square()
    torch.testing.assert_close(
        schedule.min_snr_weights(timesteps, 5.0).double() * error.mean(dim=(1, 2, 3)),
        snr.clamp(max=5.0) * (wrong - latents).square().mean(dim=(1, 2, 3)),
        rtol=1e-4, atol=1e-8,
    )  # fmt: skip


def test_min_snr_at_the_ends_is_finite():
    end = torch.tensor([999])
    for prediction, weight in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        schedule = training_schedule(
            EulerDiscreteScheduler(prediction_type=prediction, rescale_betas_zero_snr=True, beta_schedule="linear")
        )
        assert schedule.scheduler.alphas_cumprod[-1] == 0
        assert schedule.min_snr_weights(end, 5.0).item() == pytest.approx(weight)
    flow = FlowSchedule()
    assert flow.min_snr_weights(torch.tensor([0.0, 1000.0]), 5.0).tolist() == [0.0, 0.0]


def test_shares_are_uniform_tilted_or_in_the_middle():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(draw_shares(uniform), uniform)
    assert draw_shares(uniform, exponent=0.5).mean() == pytest.approx(2 / 3, abs=0.004)
    middle = draw_shares(uniform, "logit_normal")
    logits = torch.logit(middle)
    assert logits.mean() == pytest.approx(0, abs=0.02)
    assert logits.std() == pytest.approx(1, abs=0.02)
    with pytest.raises(RequestError, match=r"timestep_sampling must be .* got 'mode'"):
        draw_shares(uniform, "mode")


@given(
    share=st.floats(0, 1, exclude_max=True),
    sampling=st.sampled_from(["uniform", "logit_normal"]),
    shift=st.floats(0.2, 8),
)
def test_timesteps_stay_within_the_schedule(share, sampling, shift):
    shares = draw_shares(torch.tensor([share], dtype=torch.float64), sampling)
    assert 0 <= shares.item() <= 1
    diffusion = DiffusionSchedule(DDPMScheduler(num_train_timesteps=10)).timesteps(shares)
    assert diffusion.dtype == torch.int64
    assert 0 <= diffusion.item() <= 9
    flow = FlowSchedule(10, shift).timesteps(shares)
    assert flow.dtype == torch.float32
    assert 0 <= flow.item() <= 10

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.errors import RequestError
from msdiffusion.training.learning.objective import DropRates, draw_drops, sample_errors, subject_area


def uniforms(count):
    return torch.rand(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()


def test_drops_come_at_their_rates():
    image, text, grounding = draw_drops(DropRates(), *uniforms(200_000))
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
    off = draw_drops(DropRates(image=0, text=0, both=0, grounding=0), *uniforms(1000))
    assert not any(drop.any() for drop in off)
    forced = draw_drops(DropRates(image=0, text=0, both=1, grounding=1), *uniforms(1000))
    assert all(drop.all() for drop in forced)


def test_drops_are_a_function_of_their_uniforms():
    condition, grounding = uniforms(64)
    first, second = (draw_drops(DropRates(image=0.3), condition, grounding) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    order = torch.arange(63, -1, -1)
    turned = draw_drops(DropRates(image=0.3), condition[order], grounding[order])
    assert all(torch.equal(a[order], b) for a, b in zip(first, turned, strict=True))


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


def test_area_covers_the_boxes_and_no_padding():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]], [[0.5, 0.5, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0]]])
    area = subject_area(boxes, 2, 4)
    assert area.shape == (2, 1, 2, 4)
    assert area[:, 0].tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]]


def test_weights_of_one_give_the_plain_mean_of_each_sample():
    prediction, target = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    expected = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(sample_errors(prediction, target, torch.ones(2, 1, 4, 6)), expected)
    torch.testing.assert_close(sample_errors(prediction, target), expected)


def test_weights_move_the_attention_within_a_sample():
    target = torch.zeros(1, 2, 1, 2)
    prediction = torch.tensor([1.0, 3.0]).expand(1, 2, 1, 2)  # errors 1 and 9
    assert sample_errors(prediction, target, torch.tensor([[[[1.0, 3.0]]]])).item() == pytest.approx((1 + 27) / 4)
    assert sample_errors(prediction, target, torch.tensor([[[[1.0, 0.0]]]])).item() == pytest.approx(1)
    assert sample_errors(prediction, target, torch.zeros(1, 1, 1, 2)).item() == 0


def test_half_precision_predictions_are_compared_in_float32():
    prediction = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)  # its square overflows float16
    error = sample_errors(prediction, torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 64, 64))
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(90_000)


@given(count=st.integers(2, 8), parts=st.integers(2, 4), seed=st.integers(0, 2**16))
def test_the_loss_of_a_batch_is_the_mean_of_its_equal_parts(count, parts, seed):
    """So processes that share a batch learn what one learns, however their boxes and weights differ."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count * parts, 2, 3, 3)
    prediction, target = torch.randn(2, *shape, generator=generator).unbind()
    weights = torch.rand(shape[0], 1, 3, 3, generator=generator) * torch.rand(shape[0], 1, 1, 1, generator=generator)
    whole = sample_errors(prediction, target, weights).mean()
    halves = [
        sample_errors(*three).mean()
        for three in zip(prediction.chunk(parts), target.chunk(parts), weights.chunk(parts), strict=True)
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-5, atol=1e-6)

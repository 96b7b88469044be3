import itertools
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.training.samples.draws import (
    AUGMENTATION,
    OBJECTIVE,
    ORDER,
    VALIDATION,
    SampleDraws,
    generator_for,
    number_of,
)

numbers = st.integers(0, 2**60)
SHAPE = (4, 6, 5)


@given(numbers, st.sampled_from([AUGMENTATION, OBJECTIVE, ORDER, VALIDATION]), numbers)
def test_a_generator_depends_on_its_numbers_alone(seed, purpose, number):
    first = generator_for(seed, purpose, number).random(4)
    np.random.seed(1)
    torch.manual_seed(1)
    np.testing.assert_array_equal(first, generator_for(seed, purpose, number).random(4))


def test_streams_have_nothing_in_common():
    keys = list(itertools.product((0, 1, 2**40), (AUGMENTATION, OBJECTIVE, ORDER, VALIDATION), (0, 1, 7)))
    draws = {key: tuple(generator_for(*key).random(3)) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert tuple(generator_for(0, ORDER, 1, 2).random(3)) != tuple(generator_for(0, ORDER, 2, 1).random(3))


def test_a_generator_is_the_same_in_every_version():
    """Else a resumed run would go on with other noise after an update, and nobody would know."""
    np.testing.assert_allclose(
        generator_for(0, OBJECTIVE, 12345).random(3),
        [0.6461044486304085, 0.0702836713405619, 0.6604215263115049],
        rtol=0,
        atol=1e-15,
    )
    assert number_of("clip_000012") == 39114168771335193


def test_neighbours_are_independent():
    first = np.array([generator_for(0, OBJECTIVE, n).random() for n in range(4000)])
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    assert abs(first.mean() - 0.5) < 0.02
    assert abs(first.std() - 12**-0.5) < 0.01


def test_numbers_of_keys():
    made = [number_of(f"clip_{i:06d}") for i in range(1000)]
    assert len(set(made)) == 1000
    assert min(made) >= 0
    assert max(made) < 2**56
    assert number_of("clip_000001") == made[1]


@given(st.lists(numbers, min_size=1, max_size=5), st.data())
def test_a_row_does_not_depend_on_its_neighbours(samples, data):
    row = data.draw(st.integers(0, len(samples) - 1))
    together = SampleDraws.draw([generator_for(0, OBJECTIVE, n) for n in samples], SHAPE)
    alone = SampleDraws.draw([generator_for(0, OBJECTIVE, samples[row])], SHAPE)
    for field in fields(SampleDraws):
        torch.testing.assert_close(
            getattr(together, field.name)[row : row + 1], getattr(alone, field.name), rtol=0, atol=0
        )


def test_shapes_types_and_distributions():
    draws = SampleDraws.draw([generator_for(0, OBJECTIVE, n) for n in range(400)], SHAPE)
    for name in ("condition", "grounding", "timestep"):
        uniform = getattr(draws, name)
        assert uniform.shape == (400,)
        assert uniform.dtype == torch.float64
        assert 0 <= uniform.min() < 0.05 < 0.95 < uniform.max() < 1
    for name, shape in (("noise", SHAPE), ("posterior", SHAPE), ("offset", (4, 1, 1))):
        normal = getattr(draws, name)
        assert normal.shape == (400, *shape)
        assert normal.dtype == torch.float32
        assert abs(normal.mean()) < 0.1
        assert abs(normal.std() - 1) < 0.1
    assert abs((draws.noise * draws.posterior).mean()) < 0.05, "noise and posterior go together"


def test_they_move_and_travel_whole():
    draws = SampleDraws.draw([generator_for(0, OBJECTIVE, 0)], SHAPE)
    assert all(getattr(draws.to("meta"), field.name).is_meta for field in fields(SampleDraws))
    copy = pickle.loads(pickle.dumps(draws))
    torch.testing.assert_close(copy.noise, draws.noise, rtol=0, atol=0)


@pytest.mark.gpu
def test_they_are_pinned_whole():
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a CUDA device")
    draws = SampleDraws.draw([generator_for(0, OBJECTIVE, 0)], SHAPE).pin_memory()
    assert all(getattr(draws, field.name).is_pinned() for field in fields(SampleDraws))

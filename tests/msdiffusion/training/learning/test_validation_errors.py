"""Errors at fixed timesteps: means of means, weights that count, and the same for any split of the samples."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.training.learning.validation_errors import TimestepErrors


def same(sums):
    return sums


def add(errors, places, values, inside=None, weights=None):
    inside = values if inside is None else inside
    has = [value is not None for value in inside]
    numbers = [0.0 if value is None else value for value in inside]
    weights = [1.0] * len(values) if weights is None else weights
    errors.add(torch.tensor(places), *(torch.tensor(x) for x in (values, numbers, has, weights)))


def test_loss_is_the_mean_over_timesteps_of_means():
    errors = TimestepErrors([100, 500], "cpu")
    add(errors, [0, 0, 0, 1], [1.0, 2.0, 3.0, 10.0], inside=[1.0, 1.0, None, 5.0])
    assert errors.results(same) == {"loss": 6.0, "loss_in_boxes": 3.0, "loss_t100": 2.0, "loss_t500": 10.0}


def test_what_has_no_weight_or_did_not_occur_does_not_count():
    errors = TimestepErrors([100, 300, 500], "cpu")
    add(errors, [0, 2, 0], [1.0, 7.0, 99.0], inside=[None, None, 1.0], weights=[1.0, 1.0, 0.0])
    assert errors.results(same) == {"loss": 4.0, "loss_t100": 1.0, "loss_t500": 7.0}
    assert TimestepErrors([100], "cpu").results(same) == {}


@given(
    values=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    processes=st.integers(1, 3),
)
def test_any_split_over_batches_and_processes_gives_the_same(values, cuts, processes):
    whole = TimestepErrors([1, 2, 3], "cpu")
    places = [i % 3 for i in range(len(values))]
    add(whole, places, values)
    parts = [TimestepErrors([1, 2, 3], "cpu") for _ in range(processes)]
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for number, (start, end) in enumerate(pairwise(edges)):
        if start < end:
            add(parts[number % processes], places[start:end], values[start:end])
    together = parts[0].results(lambda sums: sum(part._sums for part in parts))
    assert together == pytest.approx(whole.results(same), rel=1e-12)

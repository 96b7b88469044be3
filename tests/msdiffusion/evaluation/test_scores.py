"""Exact values worked out by hand, and the guards."""

import numpy as np
import pytest
from scipy import stats

from msdiffusion.errors import DataError
from msdiffusion.evaluation import scores


def test_accuracy_is_the_share_of_true():
    assert scores.accuracy([True, False, True, True]) == 0.75


@pytest.mark.parametrize("values", [[], [1, 0]], ids=["empty", "numbers"])
def test_accuracy_refuses_what_is_no_list_of_flags(values):
    with pytest.raises(DataError, match="right"):
        scores.accuracy(values)


def test_wilson_interval_agrees_with_scipy():
    for successes, count in [(0, 10), (3, 10), (10, 10), (150, 212)]:
        expected = stats.binomtest(successes, count).proportion_ci(method="wilson")
        found = scores.wilson_interval(successes, count)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(successes, count):
    with pytest.raises(DataError, match=f"got {successes} of {count}"):
        scores.wilson_interval(successes, count)


def test_sign_test_by_hand_and_by_scipy():
    assert scores.sign_test(0, 0) == 1.0
    assert scores.sign_test(5, 5) == 1.0
    assert scores.sign_test(10, 0) == 2 / 2**10
    assert scores.sign_test(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert scores.sign_test(130, 41) == pytest.approx(stats.binomtest(41, 171).pvalue, rel=1e-9)
    assert scores.sign_test(3000, 0) == 0.0  # below the smallest float, not an overflow


def test_sign_test_refuses_negative_counts():
    with pytest.raises(DataError, match="negative"):
        scores.sign_test(-1, 3)


def test_mcnemar_counts_the_four_cells():
    first = [True, True, True, True, False, False]
    second = [True, False, False, False, True, False]
    test = scores.mcnemar_exact(first, second)
    assert (test.count, test.both, test.only_first, test.only_second, test.neither) == (6, 1, 3, 1, 1)
    assert test.p_value == pytest.approx(2 * (1 + 4) / 16)
    assert test.difference == pytest.approx(2 / 6)


def test_mcnemar_refuses_different_samples():
    with pytest.raises(DataError, match="got 2 and 1"):
        scores.mcnemar_exact([True, False], [True])


def test_group_test_lets_each_picture_vote_once():
    groups = ["a", "a", "a", "b", "b", "c", "d"]
    first = [True, True, True, True, False, True, False]
    second = [False, False, True, False, True, True, False]
    test = scores.paired_group_test(first, second, groups)
    # a: 3 against 1; b: 1 against 1; c: both; d: neither.
    assert (test.count, test.only_first, test.only_second, test.both, test.neither) == (4, 1, 0, 2, 1)
    assert test.p_value == 1.0


def test_group_test_refuses_other_lengths():
    with pytest.raises(DataError, match="1, 1, 2"):
        scores.paired_group_test([True], [False], [0, 1])


def test_bootstrap_covers_the_mean_and_repeats_itself():
    values = np.random.default_rng(0).normal(3.0, 1.0, 200)
    found = scores.bootstrap_interval(values, seed=1)
    assert found == scores.bootstrap_interval(values, seed=1)
    expected = stats.norm.interval(0.95, values.mean(), values.std() / 200**0.5)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.03)


def test_bootstrap_over_groups_is_wider_when_groups_agree():
    values = np.repeat([0.0, 1.0] * 10, 8)
    groups = np.repeat(np.arange(20), 8)
    alone, grouped = scores.bootstrap_interval(values), scores.bootstrap_interval(values, groups=groups)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one"),
        ([1.0], {"groups": [0, 1]}, "1 values, 2 groups"),
        ([1.0], {"level": 1.0}, "level"),
    ],
)
def test_bootstrap_guards(values, options, message):
    with pytest.raises(DataError, match=message):
        scores.bootstrap_interval(values, **options)


def test_chance_agreement():
    assert scores.chance_agreement(["a", "b", "a", "b"], ["a", "a", "b", "b"]) == 0.5
    assert scores.chance_agreement(["a", "a", "a", "b"], ["a", "a", "a", "a"]) == 0.75
    assert scores.chance_agreement([{"a", "b"}, {"a"}], ["a", "b"]) == 0.75
    assert scores.chance_agreement(["a", "b"], ["c", "c"]) == 0.0
    with pytest.raises(DataError, match="2 and 1"):
        scores.chance_agreement(["a", "b"], ["a"])


def test_cosine_similarity_by_hand():
    found = scores.cosine_similarity([[1, 0], [3, 4], [1, 1]], [[0, 2], [6, 8], [-1, -1]])
    np.testing.assert_allclose(found, [0.0, 1.0, -1.0], atol=1e-15)


@pytest.mark.parametrize(
    ("first", "second", "message"), [([[1, 0]], [[1, 0, 0]], "shapes"), ([[0, 0]], [[1, 0]], "all zero")]
)
def test_cosine_guards(first, second, message):
    with pytest.raises(DataError, match=message):
        scores.cosine_similarity(first, second)


def test_fidelity_means_over_pictures_and_multiplies_over_subjects():
    pictures = [[1.0, 0.0], [0.0, 1.0]]
    references = [[[1.0, 0.0], [3.0, 4.0]], [[0.0, 2.0]]]  # cosines .6 and 1 for the first, 1 for the second
    assert scores.subject_fidelity(pictures, references) == pytest.approx((0.8 + 1.0) / 2)
    assert scores.multi_subject_fidelity(pictures, references) == pytest.approx((0.6 + 1.0) / 2)
    assert scores.text_alignment(pictures, [[1.0, 0.0], [1.0, 0.0]]) == pytest.approx(0.5)


def test_two_missing_subjects_do_not_multiply_to_a_score():
    assert scores.multi_subject_fidelity([[1.0, 0.0]], [[[-1.0, 0.0], [-1.0, 0.0]]]) == 0.0


@pytest.mark.parametrize(
    ("pictures", "references", "message"),
    [
        ([[1.0, 0.0]], [], "0 reference sets"),
        ([[1.0, 0.0]], [[1.0, 0.0]], r"\(subjects, width\)"),
    ],
)
def test_fidelity_guards(pictures, references, message):
    with pytest.raises(DataError, match=message):
        scores.multi_subject_fidelity(pictures, references)


def test_the_fast_way_to_a_means_interval_equals_the_general_one():
    rng = np.random.default_rng(3)
    values, groups = rng.random(40), rng.integers(12, size=40)
    fast = scores.bootstrap_interval(values, groups=groups, resamples=300)
    general = scores.bootstrap_interval(values, groups=groups, resamples=300, statistic=lambda v: float(np.mean(v)))
    assert (fast.low, fast.high) == pytest.approx((general.low, general.high))


def test_interval_over_runs_is_the_plain_one_for_a_single_run():
    rng = np.random.default_rng(3)
    values, groups = rng.random(40), rng.integers(12, size=40)
    assert scores.interval_over_runs(values[None], groups) == scores.bootstrap_interval(values, groups=groups)


def test_interval_over_runs_covers_what_runs_differ_in():
    groups = np.arange(50)
    runs = np.stack([np.full(50, level) for level in (0.2, 0.5, 0.8)])
    spread = scores.interval_over_runs(runs, groups)
    assert spread.low < 0.31 and spread.high > 0.69
    same = scores.interval_over_runs(np.full((3, 50), 0.5), groups)
    assert (same.low, same.high) == (0.5, 0.5)
    with pytest.raises(DataError, match="one group"):
        scores.interval_over_runs(runs, groups[:-1])

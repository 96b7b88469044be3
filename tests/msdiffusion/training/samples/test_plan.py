import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.samples.plan import EpochPlan, PlannedDataset, padded_order

seeds = st.integers(0, 2**32)


@st.composite
def datasets(draw, first=0, max_shards=6, max_pairs=12):
    """A dataset of some shards, of which some pairs are held out."""
    sizes = draw(st.lists(st.integers(1, max_pairs), min_size=1, max_size=max_shards))
    shards = np.repeat(np.arange(len(sizes)), sizes)
    held_out = np.array(draw(st.lists(st.booleans(), min_size=len(shards), max_size=len(shards))))
    held_out[draw(st.integers(0, len(shards) - 1))] = False
    indices = np.flatnonzero(~held_out)
    return PlannedDataset(first + indices, shards[indices], name=f"data/{first}")


def make(sizes, first=0, weight=1.0, name="data/pairs"):
    count = sum(sizes)
    return PlannedDataset(np.arange(first, first + count), np.repeat(np.arange(len(sizes)), sizes), weight, name)


@given(datasets(), seeds, st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 20))
def test_every_pair_once_but_for_the_last_incomplete_batch(dataset, seed, epoch, batch, lanes, buffer):
    if len(dataset) < batch:
        with pytest.raises(DataError, match="fewer than one batch"):
            EpochPlan([dataset], seed=seed, global_batch=batch)
        return
    plan = EpochPlan([dataset], seed=seed, global_batch=batch, lanes=lanes, shuffle_buffer=buffer)
    order = plan.order(epoch)
    assert order.dtype == np.int64
    assert len(order) == plan.samples_per_epoch == len(plan) == len(dataset) // batch * batch
    assert len(set(order.tolist())) == len(order), "a pair came twice"
    assert set(order.tolist()) <= set(dataset.indices.tolist()), "a held-out pair came"
    np.testing.assert_array_equal(order, plan.order(epoch))


@given(datasets(max_pairs=20), seeds, st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1)]))
def test_processes_together_see_what_one_would_see(dataset, seed, shares):
    processes, batch = shares
    if len(dataset) < 8:
        return
    orders = [
        EpochPlan([dataset], seed=seed, global_batch=n, lanes=8, shuffle_buffer=5).order(0)
        for n in (8, processes * batch)
    ]
    np.testing.assert_array_equal(*orders)
    parts = [orders[1][rank::processes].reshape(-1, batch) for rank in range(processes)]
    for number, together in enumerate(orders[0].reshape(-1, 8)):
        assert sorted(together) == sorted(np.concatenate([part[number] for part in parts]))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=10), seeds, st.integers(1, 6), st.integers(1, 12))
def test_a_lane_is_read_nearly_in_the_order_of_the_files(sizes, seed, lanes, buffer):
    dataset = make(sizes)
    plan = EpochPlan([dataset], seed=seed, global_batch=1, lanes=lanes, shuffle_buffer=buffer)
    order = plan.order(0)
    shard_of = dict(zip(dataset.indices.tolist(), dataset.shards.tolist(), strict=True))
    for lane in range(lanes):
        mine = order[lane::lanes].tolist()
        # the order of the files that this lane would have without the shuffle within blocks: shards as they first come
        shards = list(dict.fromkeys(shard_of[index] for index in mine))
        for start in range(len(mine)):
            window = {shard_of[index] for index in mine[start : start + buffer]}
            reach = 2 * buffer  # a window of the buffer's length touches two blocks at most
            assert len(window) <= min(len(shards), reach // min(sizes) + 2)
        spans = [[place for place, index in enumerate(mine) if shard_of[index] == shard] for shard in shards]
        long = [places for places in spans if places[-1] - places[0] >= len(places) + 2 * buffer]
        # the shard where the ring was cut open comes first and last: in one lane only if there is but one
        assert len(long) <= (lanes == 1), "a shard is open for longer than its samples last"


def test_a_shuffle_of_one_keeps_the_order_within_shards():
    order = EpochPlan([make([5, 5, 5])], seed=0, global_batch=1, lanes=1, shuffle_buffer=1).order(0)
    for shard in range(3):
        places = [index % 5 for index in order if index // 5 == shard]
        turns = sum(later != earlier + 1 for earlier, later in itertools.pairwise(places))
        assert turns == (1 if order[0] // 5 == shard and order[0] % 5 else 0)


@pytest.mark.parametrize("sizes", [[40], [10, 10, 10, 10], [1] * 40])
def test_epochs_and_seeds_differ(sizes):
    plans = [EpochPlan([make(sizes)], seed=seed, global_batch=4, lanes=4, shuffle_buffer=8) for seed in (0, 1)]
    orders = [tuple(plan.order(epoch)) for plan in plans for epoch in range(3)]
    assert len(set(orders)) == 6


def test_other_pairs_are_left_out_in_other_epochs():
    plan = EpochPlan([make([10, 9])], seed=0, global_batch=4)
    left_out = [set(range(19)) - set(plan.order(epoch).tolist()) for epoch in range(20)]
    assert all(len(pairs) == 3 for pairs in left_out)
    assert len(set.union(*left_out)) > 12


def test_pairs_of_all_shards_come_early_and_late():
    """Chance alone decides when a pair comes: over many epochs, the mean place of each is about the middle."""
    plan = EpochPlan([make([25] * 4)], seed=3, global_batch=1, lanes=4, shuffle_buffer=10)
    places = np.mean([np.argsort(plan.order(epoch)) for epoch in range(400)], axis=0)
    assert abs(places - 49.5).max() < 8


@given(
    st.lists(datasets(max_shards=3), min_size=2, max_size=3),
    st.lists(st.sampled_from([0.25, 1, 1.5, 4]), min_size=3, max_size=3),
    seeds,
    st.integers(1, 4),
)
def test_a_mixture_has_exact_shares(parts, weights, seed, lanes):
    weights = weights[: len(parts)]
    parts = [
        PlannedDataset(1000 * number + part.indices, part.shards, weight, f"data/{number}")
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
    ]
    try:
        plan = EpochPlan(parts, seed=seed, global_batch=1, lanes=lanes, shuffle_buffer=4)
    except (RequestError, DataError):  # too small for that weight, tested below
        return
    rows = sum(map(len, parts)) // lanes
    assert plan.samples_per_epoch == rows * lanes
    run = np.concatenate([plan.order(epoch) for epoch in range(4)])
    for count in range(1, 5):
        so_far = run[: count * rows * lanes] // 1000
        for number, weight in enumerate(weights):
            share = weight / sum(weights) * count * rows
            assert abs(np.count_nonzero(so_far == number) / lanes - share) < 1 + 1e-9
    for row in (run // 1000).reshape(-1, lanes):
        assert len(set(row)) == 1, "a row of places has pairs of two datasets"
    for number, part in enumerate(parts):
        mine = run[run // 1000 == number]
        for start in range(0, len(mine), len(part)):
            one_pass = mine[start : start + len(part)].tolist()
            assert len(set(one_pass)) == len(one_pass), "a pair came again before all the others came"


@pytest.mark.parametrize(
    ("sizes", "weights", "batch", "lanes"),
    [
        ([500, 60], [9, 1], 128, 8),
        ([100, 100], [1, 3], 128, 8),
        ([300, 300], [1, 9], 256, 8),
        ([50, 70, 31], [1, 5, 2], 20, 6),
    ],
)
def test_a_mixture_hands_out_everything_where_batches_do_not_fill_its_rounds(sizes, weights, batch, lanes):
    starts = np.cumsum([0, *sizes])
    parts = [
        make([10] * (size // 10) + [size % 10] * (size % 10 > 0), int(start), weight, f"data/{start}")
        for size, start, weight in zip(sizes, starts[:-1], weights, strict=True)
    ]
    plan = EpochPlan(parts, seed=0, global_batch=batch, lanes=lanes, shuffle_buffer=16)
    assert plan.samples_per_epoch % batch == 0
    assert sum(sizes) // lanes * lanes % batch, "this test is about what is left over"
    run = np.concatenate([plan.order(epoch) for epoch in range(20)])
    of = np.searchsorted(starts, run, side="right") - 1
    for number, weight in enumerate(weights):
        so_far = np.cumsum(of == number) / lanes
        wanted = weight / sum(weights) * np.arange(1, len(run) + 1) / lanes
        assert np.abs(so_far - wanted).max() < len(sizes) + 1
        times = np.bincount(run[of == number], minlength=starts[-1])[starts[number] : starts[number + 1]]
        assert times.max() - times.min() <= 1, "a pair came again before all the others came"
    # an epoch begins within a row of places, and within a pass, of the one before
    np.testing.assert_array_equal(run[3 * plan.samples_per_epoch :][: plan.samples_per_epoch], plan.order(3))


def test_a_checkpoint_of_a_mixture_that_left_something_out_is_known_by_its_identity():
    parts = [make([60], 0, 3), make([20], 100, 1, "data/b")]
    assert "epochs of the mixture" in EpochPlan(parts, seed=0, global_batch=6, lanes=2).identity()
    assert "epochs of the mixture" not in EpochPlan(parts, seed=0, global_batch=8, lanes=2).identity()


def test_a_mixture_is_spread_evenly():
    plan = EpochPlan([make([60], 0, 3), make([20], 100, 1, "data/b")], seed=0, global_batch=4, lanes=2)
    rows = plan.order(1).reshape(-1, 2)[:, 0] >= 100
    assert [int(n) for n in rows.reshape(-1, 4).sum(1)] == [1] * 10


def test_lanes_of_a_mixture_keep_to_their_processes():
    """Place p of the run is in lane p % lanes of whichever dataset it comes from, pass after pass."""
    big, small = make([40], 0, 1), make([7, 6], 100, 1, "data/small")
    plan = EpochPlan([big, small], seed=0, global_batch=1, lanes=4, shuffle_buffer=1)
    run = np.concatenate([plan.order(epoch) for epoch in range(3)])
    for start in range(0, 65, 13):  # passes of the small one
        places = np.flatnonzero(run >= 100)[start : start + 13]
        for lane in range(4):
            mine = run[places[places % 4 == lane]]
            # a lane is a part of the ring of two shards: it turns to the other shard at most twice
            assert np.count_nonzero(np.diff(mine >= 107)) <= 2


@pytest.mark.parametrize("batch", [1, 4, 6, 10, 14])
def test_the_order_of_a_mixture_does_not_depend_on_where_its_epochs_end(batch):
    """So places of the run keep their lanes, and processes theirs: G and L are multiples of R."""
    parts = [make([40], 0, 1), make([7, 6], 100, 1, "data/small")]
    plan = EpochPlan(parts, seed=0, global_batch=batch, lanes=4, shuffle_buffer=3)
    whole = EpochPlan(parts, seed=0, global_batch=1, lanes=4, shuffle_buffer=3)
    run = np.concatenate([plan.order(epoch) for epoch in range(5)])
    np.testing.assert_array_equal(run, np.concatenate([whole.order(epoch) for epoch in range(5)])[: len(run)])


def test_a_weight_that_gives_no_row_is_refused():
    with pytest.raises(RequestError, match=r"weight 0.001 of data/b gives it less than one row of 8 samples"):
        EpochPlan([make([50]), make([50], 100, 0.001, "data/b")], seed=0, global_batch=4)


@given(
    datasets(max_shards=4, max_pairs=30),
    seeds,
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 2**20),
)
def test_batches_of_one_bucket(dataset, seed, batch, kinds, layout):
    buckets = np.random.default_rng(layout).integers(0, kinds, dataset.indices[-1] + 1)
    counts = np.bincount(buckets[dataset.indices], minlength=kinds)
    if not (counts // batch).any():
        with pytest.raises(DataError, match="in every bucket"):
            EpochPlan([dataset], seed=seed, global_batch=batch, buckets=buckets)
        return
    plan = EpochPlan([dataset], seed=seed, global_batch=batch, buckets=buckets, lanes=3, shuffle_buffer=4)
    for epoch in range(3):
        order = plan.order(epoch)
        assert len(order) == plan.samples_per_epoch
        assert len(set(order.tolist())) == len(order)
        assert set(order.tolist()) <= set(dataset.indices.tolist())
        rows = buckets[order].reshape(-1, batch)
        assert (rows == rows[:, :1]).all()
        np.testing.assert_array_equal(np.bincount(rows[:, 0], minlength=kinds), counts // batch)
    assert plan.pairs_never_trained() == {
        bucket: count for bucket, count in enumerate(counts.tolist()) if 0 < count < batch
    }


def test_epochs_of_a_mixture_with_buckets_are_equally_long():
    buckets = np.random.default_rng(0).integers(0, 3, 400)
    parts = [make([100, 60], 0, 2, "data/a"), make([70], 200, 1, "data/b")]
    plan = EpochPlan(parts, seed=0, global_batch=8, buckets=buckets, lanes=4)
    assert 230 - 3 * 8 - 8 < plan.samples_per_epoch <= 230
    for epoch in range(20):
        rows = buckets[plan.order(epoch)].reshape(-1, 8)
        assert rows.size == plan.samples_per_epoch
        assert (rows == rows[:, :1]).all()


def test_buckets_keep_the_order_of_the_plan_without_them():
    buckets = np.arange(40) % 2
    without = EpochPlan([make([20, 20])], seed=0, global_batch=4).order(0)
    order = EpochPlan([make([20, 20])], seed=0, global_batch=4, buckets=buckets).order(0)
    for bucket in (0, 1):
        assert [i for i in order if buckets[i] == bucket] == [i for i in without if buckets[i] == bucket]
    # and a batch does not come before it could be full
    place = np.argsort(without)
    ends = place[order.reshape(-1, 4)].max(1)
    assert (np.diff(ends) > 0).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"global_batch": 0}, "global_batch must be at least 1"),
        ({"lanes": 0}, "lanes must be at least 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
    ],
)
def test_bad_numbers_are_refused(setting, message):
    with pytest.raises(RequestError, match=message):
        EpochPlan([make([10])], **{"seed": 0, "global_batch": 1} | setting)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_bad_weights_are_refused(weight):
    with pytest.raises(RequestError, match="the weight of data/pairs must be a number above 0"):
        make([4], weight=weight)


def test_a_dataset_without_pairs_is_refused():
    with pytest.raises(DataError, match="data/a has no pair to train on"):
        make([], name="data/a")


def test_pairs_of_a_shard_must_lie_together():
    with pytest.raises(DataError, match="do not lie side by side"):
        PlannedDataset(np.arange(3), np.array([0, 1, 0]))


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**20))
def test_validation_sees_every_pair_once(count, processes, batch, kinds, layout):
    chance = np.random.default_rng(layout)
    indices = np.sort(chance.choice(100, count, replace=False))
    buckets = chance.integers(0, kinds, 100)
    for given_buckets in (None, buckets):
        numbers, order = padded_order(indices, processes, batch, given_buckets)
        assert len(numbers) == len(order)
        assert len(order) % processes == 0
        real = numbers < count
        assert sorted(numbers[real].tolist()) == list(range(count))
        np.testing.assert_array_equal(order[real], indices[numbers[real]])
        assert set(order[~real].tolist()) <= set(indices.tolist())
        assert len(set(numbers.tolist())) == len(numbers)
        if given_buckets is None:
            np.testing.assert_array_equal(order[real], indices)
            assert np.count_nonzero(~real) < processes
            continue
        for start in range(0, len(order), processes * batch):
            assert len(set(buckets[order[start : start + processes * batch]].tolist())) == 1


def test_an_epoch_is_whole_steps():
    plans = [
        EpochPlan([make([30])], seed=0, global_batch=batch, batches_per_step=parts) for batch, parts in ((8, 1), (2, 4))
    ]
    assert [plan.batches_per_epoch for plan in plans] == [3, 12]
    for epoch in (0, 5):
        np.testing.assert_array_equal(*[plan.order(epoch) for plan in plans])
    # a checkpoint of before is a place in other epochs; where nothing is left out, it is as it was
    assert plans[1].identity()["batches of an epoch"] == 12
    assert "batches of an epoch" not in EpochPlan([make([32])], seed=0, global_batch=2, batches_per_step=4).identity()


def test_a_mixture_goes_on_where_the_last_whole_step_ended():
    sources = [make([20]), make([13], first=20, weight=2.0)]
    plans = [
        EpochPlan(sources, seed=0, global_batch=batch, lanes=2, batches_per_step=parts)
        for batch, parts in ((6, 1), (2, 3))
    ]
    for epoch in range(4):
        np.testing.assert_array_equal(*[plan.order(epoch) for plan in plans])


def test_fewer_pairs_than_a_step_are_told():
    with pytest.raises(DataError, match="9 pairs to train on make 4 batches of 2, fewer than the 5 of one step"):
        EpochPlan([make([9])], seed=0, global_batch=2, batches_per_step=5)

"""The order of the data: a bijection in every epoch, exact shares in every period, arithmetic backwards too."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_train.data.order import PERIOD, BatchSizes, OlmoOrder, PermutedOrder, key_of, permute, quotas

few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 5000)
seeds = st.integers(0, 2**63)


# ---- the permutation


@few
@given(n=sizes, seed=seeds)
def test_permute_is_a_bijection_and_runs_backwards(n, seed):
    key = key_of("test", seed)
    sent = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(sent), np.arange(n))
    assert np.array_equal(permute(sent, n, key, backwards=True), np.arange(n))


@few
@given(n=st.integers(2**20, 2**60), seed=seeds, start=st.integers(0, 2**19))
def test_permute_needs_no_memory_and_stays_inside_at_any_size(n, seed, start):
    key, x = key_of("test", seed), np.arange(start, start + 100)
    sent = permute(x, n, key)
    assert len(np.unique(sent)) == 100 and sent.min() >= 0 and sent.max() < n
    assert np.array_equal(permute(sent, n, key, backwards=True), x)


def test_permute_looks_like_chance():
    """Neighbours part, and an element lands anywhere alike: chi-square over 16 bins for 4000 keys, 15 degrees of freedom."""
    n = 1000
    sent = permute(np.arange(n), n, key_of("test", 1))
    assert 230 < np.abs(np.diff(sent)).mean() < 430  # 333 by chance
    assert len(np.flatnonzero(sent == np.arange(n))) < 8
    landed = np.array([permute(np.array([7]), n, key_of("test", seed))[0] for seed in range(4000)])
    counts = np.bincount(landed * 16 // n, minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 45


def test_the_shape_is_kept():
    x = np.arange(12).reshape(3, 4)
    assert permute(x, 12, key_of("test", 1)).shape == (3, 4)
    assert permute(np.array([], dtype=np.int64), 12, key_of("test", 1)).size == 0


def test_a_key_depends_on_every_part():
    keys = [key_of("epoch", 1, "a", 0), key_of("epoch", 2, "a", 0), key_of("epoch", 1, "b", 0), key_of("epoch", 1, "a", 1)]
    assert len({key.tobytes() for key in keys}) == 4
    assert len(set(keys[0].tolist())) == 8, "the rounds differ"


# ---- quotas and mixing

weight_lists = st.lists(st.floats(0.001, 10), min_size=1, max_size=6)


@few
@given(weights=weight_lists)
def test_quotas_are_exact_to_one_place_and_fill_the_period(weights):
    places = quotas(weights)
    exact = np.array(weights) / np.sum(weights) * PERIOD
    assert places.sum() == PERIOD
    assert (np.abs(places - exact) < 1 + 1e-6).all()


def test_a_source_of_weight_zero_gets_no_place():
    assert quotas([0.0, 1.0, 2.0]).tolist() == [0, 3333, 6667]


@st.composite
def orders(draw):
    count = draw(st.integers(1, 4))
    amounts = draw(st.lists(st.integers(300, 3000), min_size=count, max_size=count))
    share = st.lists(st.integers(0, 5), min_size=count, max_size=count).filter(any)
    starts = draw(st.lists(st.integers(1, 15_000), max_size=2, unique=True))
    stages = [(start, draw(share)) for start in [0, *sorted(starts)]]
    return PermutedOrder([f"source-{i}" for i in range(count)], amounts, stages, draw(st.integers(0, 2**40)))


LENGTH = 25_000


@settings(max_examples=8, deadline=None)
@given(order=orders())
def test_every_epoch_of_every_source_holds_each_instance_exactly_once(order):
    read = order.at(np.arange(LENGTH))
    for s, n in enumerate(order.sizes):
        mine, epochs = read.instance[read.source == s], read.epoch[read.source == s]
        assert np.array_equal(epochs, np.arange(len(mine)) // n), "epochs follow one another"
        for epoch in range(len(mine) // n):
            assert np.array_equal(np.sort(mine[epochs == epoch]), np.arange(n))
        rest = mine[len(mine) // n * n :]
        assert len(np.unique(rest)) == len(rest) and (rest < n).all()


@settings(max_examples=8, deadline=None)
@given(order=orders())
def test_shares_are_exact_in_every_period_of_every_stage(order):
    source = order.at(np.arange(LENGTH)).source
    ends = [*order.starts[1:], LENGTH]
    for start, end, quota in zip(order.starts, ends, order.quotas, strict=True):
        for first in range(start, end - PERIOD + 1, PERIOD):
            assert np.array_equal(np.bincount(source[first : first + PERIOD], minlength=len(quota)), quota)


@settings(max_examples=8, deadline=None)
@given(order=orders(), place=st.integers(0, LENGTH))
def test_visits_before_a_place_are_counted(order, place):
    source = order.at(np.arange(LENGTH)).source[:place]
    assert np.array_equal(order.visits_before(place), np.bincount(source, minlength=len(order.sizes)))


@settings(max_examples=8, deadline=None)
@given(order=orders(), data=st.data())
def test_places_of_is_the_inverse_of_at(order, data):
    read = order.at(np.arange(LENGTH))
    for _ in range(5):
        source = data.draw(st.integers(0, len(order.sizes) - 1))
        instance = data.draw(st.integers(0, int(order.sizes[source]) - 1))
        last = data.draw(st.integers(0, LENGTH))
        expected = np.flatnonzero((read.source == source) & (read.instance == instance))
        assert order.places_of(source, instance, last).tolist() == expected[expected < last].tolist()


def test_a_source_of_one_instance_is_read_over_and_over():
    order = PermutedOrder(["a", "b"], [1, 2], [(0, [1, 3])], seed=1)
    read = order.at(np.arange(400))
    assert not read.instance[read.source == 0].any()
    assert np.array_equal(np.sort(read.instance[read.source == 1][:200].reshape(-1, 2)), np.tile([0, 1], (100, 1)))
    assert order.places_of(0, 0, 400).tolist() == np.flatnonzero(read.source == 0).tolist()


def test_an_instance_that_a_later_mix_leaves_out_has_no_place():
    order = PermutedOrder(["a", "b"], [10_000, 300], [(0, [1, 1]), (5000, [0, 1])], seed=1)
    read = order.at(np.arange(LENGTH))
    seen = set(read.instance[read.source == 0].tolist())
    unseen = next(i for i in range(10_000) if i not in seen)
    assert order.places_of(0, unseen, LENGTH).size == 0


@settings(max_examples=8, deadline=None)
@given(order=orders(), seed=st.integers(0, 100))
def test_places_in_any_order_hold_the_same_instances_as_in_a_row(order, seed):
    places = np.random.default_rng(seed).integers(0, LENGTH, 200)
    whole, some = order.at(np.arange(LENGTH)), order.at(places)
    assert np.array_equal(some.source, whole.source[places])
    assert np.array_equal(some.instance, whole.instance[places])
    assert np.array_equal(some.epoch, whole.epoch[places])


def test_a_stage_added_later_does_not_change_the_past():
    names, amounts = ["a", "b"], [700, 300]
    plain = PermutedOrder(names, amounts, [(0, [1, 2])], 3).at(np.arange(20_000))
    staged = PermutedOrder(names, amounts, [(0, [1, 2]), (12_345, [5, 1])], 3).at(np.arange(20_000))
    for field in ("source", "instance", "epoch"):
        before, after = getattr(plain, field), getattr(staged, field)
        assert np.array_equal(before[:12_345], after[:12_345])
    assert not np.array_equal(plain.source[12_345:], staged.source[12_345:])


def test_epochs_sources_and_seeds_have_orders_of_their_own():
    def first(seed=1, names=("a", "b"), epoch=0):
        order = PermutedOrder(list(names), [500, 500], [(0, [1, 1])], seed)
        read = order.at(np.arange(4000))
        return [read.instance[(read.source == s) & (read.epoch == epoch)].tolist() for s in (0, 1)]

    a, b = first()
    others = [b, first(seed=2)[0], first(epoch=1)[0], first(names=("c", "b"))[0]]
    assert all(a != other for other in others)
    assert first()[0] == a, "and the same again"


def test_the_order_is_the_one_that_earlier_runs_were_trained_on():
    """A change here breaks every run that is resumed: bump the checkpoint's format and say so."""
    read = PermutedOrder(["a", "b"], [700, 300], [(0, [2, 1]), (6000, [1, 1])], 6198).at(np.arange(12_000))
    digest = hashlib.sha256(np.stack([read.source, read.instance, read.epoch]).astype("<i8").tobytes()).hexdigest()
    assert digest == GOLDEN


GOLDEN = "8991966526c48c39b52cced910b37411846d50a42407512dbe14a21bd53b09c7"


# ---- OLMo's own order

OLMO = {(6198, 0): [615, 832, 881, 9, 648, 523, 809, 336], (6198, 1): [363, 586, 975, 648, 897, 311, 471, 834],
        (0, 0): [459, 206, 222, 162, 711, 814, 350, 890]}  # fmt: skip


@pytest.mark.parametrize("seed, epoch", OLMO)
def test_the_order_of_olmo_is_its_own_shuffle(seed, epoch):
    order = OlmoOrder([1000], BatchSizes(((1, 8),)), seed=seed)
    assert order.at(1000 * epoch + np.arange(8)).instance.tolist() == OLMO[seed, epoch]


def test_the_order_of_olmo_drops_what_fills_no_batch():
    order = OlmoOrder([600, 400], BatchSizes(((1, 64),)), seed=6198)
    assert order.at(np.array([959, 960])).epoch.tolist() == [0, 1]
    read = order.at(np.arange(2 * 960))
    flat = read.instance + 600 * read.source
    shuffled = np.arange(1000, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(6198)).shuffle(shuffled)
    assert np.array_equal(flat[:960], shuffled[:960])
    assert flat[960:968].tolist() == OLMO[6198, 1]
    assert np.array_equal(read.epoch, np.repeat([0, 1], 960))


@few
@given(flat=st.integers(0, 999), last=st.integers(0, 3000))
def test_the_order_of_olmo_backwards(flat, last):
    order = OlmoOrder([600, 400], BatchSizes(((1, 64),)), seed=1)
    read = order.at(np.arange(3000))
    source, instance = divmod(flat, 600) if flat < 600 else (1, flat - 600)
    expected = np.flatnonzero((read.source == source) & (read.instance == instance))
    assert order.places_of(source, instance, last).tolist() == expected[expected < last].tolist()


# ---- batches of changing sizes

CHANGES = BatchSizes(((1, 8), (6, 3), (11, 16)))


def test_batch_sizes_map_steps_to_places_and_back():
    rows = [(step, row) for step in range(1, 15) for row in range(CHANGES.at(step))]
    assert [CHANGES.row_of(place) for place in range(len(rows))] == rows
    assert [CHANGES.places_before(step) for step in (1, 6, 7, 11, 12)] == [0, 40, 43, 55, 71]
    assert [CHANGES.steps_for(places * 10, 10) for places in (1, 8, 9, 40, 41, 55, 56, 71, 72)] == [1, 1, 2, 5, 6, 10, 11, 11, 12]


def test_a_resumed_run_keeps_the_sizes_of_the_steps_done():
    assert CHANGES.after(7, BatchSizes(((1, 5),))).changes == ((1, 8), (6, 3), (8, 5))
    assert CHANGES.after(7, BatchSizes(((1, 3),))).changes == ((1, 8), (6, 3))
    assert BatchSizes(()).after(0, BatchSizes(((1, 4),))).changes == ((1, 4),)


@pytest.mark.parametrize("changes", [CHANGES, BatchSizes(((1, 48), (2, 3), (3, 40), (4, 7))), BatchSizes(((1, 51), (3, 8)))])
def test_the_order_of_olmo_continues_its_epoch_when_the_batch_changes(changes):
    n, order, expected, epoch, position = 51, OlmoOrder([30, 21], changes, seed=4), [], 0, 0
    for step in range(1, 25):
        size = changes.at(step)
        if position + size > n:  # what fills no batch is dropped
            epoch, position = epoch + 1, 0
        expected += [(epoch, p) for p in range(position, position + size)]
        position += size
    shuffles = [OlmoOrder([51], BatchSizes(((1, 1),)), seed=4).at(np.arange(51 * e, 51 * e + 51)).instance for e in range(9)]
    mixed = order.at(np.arange(len(expected)))
    flat = [int(shuffles[e][p]) for e, p in expected]
    assert mixed.epoch.tolist() == [e for e, _ in expected] and (mixed.instance + 30 * mixed.source).tolist() == flat
    for instance in (0, 29, 30, 50):
        source = int(instance >= 30)
        found = order.places_of(source, instance - 30 * source, len(flat)).tolist()
        assert found == [place for place, read in enumerate(flat) if read == instance]

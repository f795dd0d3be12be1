"""Work shared over ranks: by hand, and by the bounds that hold for any work."""

import random

import pytest

from olmo_train.deal import deal, in_rounds


def loads(costs, owners, ranks) -> list[int]:
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]


def test_costly_work_goes_first_to_the_rank_with_the_least():
    assert deal([1, 5, 3, 4, 2], 2) == [0, 0, 1, 1, 0]  # 5 + 2 + 1, and 4 + 3
    assert deal([7, 7, 7, 7], 4) == [0, 1, 2, 3]
    assert deal([9, 1, 1, 1], 2) == [0, 1, 1, 1]
    assert deal([3, 2], 4) == [0, 1] and deal([], 3) == [] and deal([5, 6], 1) == [0, 0]


def test_equal_work_is_shared_equally_and_any_work_within_a_third_of_the_least():
    draw = random.Random(1)
    for ranks in (1, 2, 3, 8, 64):
        assert set(loads([3] * 8 * ranks, deal([3] * 8 * ranks, ranks), ranks)) == {24}
        costs = [draw.randrange(1, 100) for _ in range(200)]
        busiest = max(loads(costs, deal(costs, ranks), ranks))
        assert busiest <= 4 / 3 * max(sum(costs) / ranks, max(costs)) + 1e-9


def test_rounds_hold_each_piece_once_and_no_more_than_fits():
    draw = random.Random(2)
    sizes = [draw.randrange(1, 30) for _ in range(100)]
    owners = deal(sizes, 4)
    rounds = in_rounds(sizes, owners, most=32)
    assert sorted(piece for pieces in rounds for piece in pieces) == list(range(100))
    for pieces in rounds:
        assert max(loads([sizes[p] for p in pieces], [owners[p] for p in pieces], 4)) <= 32
    least = max(loads(sizes, owners, 4)) / 32
    assert least <= len(rounds) < 2 * least


@pytest.mark.parametrize("most, expected", [(1, [[1], [0], [2]]), (9, [[1], [0, 2]]), (14, [[1, 0, 2]])])
def test_a_piece_that_is_larger_than_a_round_has_one_to_itself(most, expected):
    assert in_rounds([3, 10, 1], [0, 0, 0], most) == expected

"""Share work over the processes of a run: pure arithmetic, with the same result on each of them."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence


def deal(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank that does each piece of work: the most costly pieces first, each by the rank that has the least work so far.

    The busiest rank has at most 4/3 of the least that is possible (Graham 1969).
    """
    owners, loads = [0] * len(costs), [(0, rank) for rank in range(ranks)]
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        load, owner = heapq.heappop(loads)
        owners[piece] = owner
        heapq.heappush(loads, (load + costs[piece], owner))
    return owners


def in_rounds(sizes: Sequence[int], owners: Sequence[int], most: int) -> list[list[int]]:
    """The pieces of each round, by number: in one round each rank has pieces of at most `most` in all, or one larger piece.

    Large pieces come first, so that pieces of one size share a round.
    """
    rounds, current, filled = defaultdict[int, list[int]](list), defaultdict[int, int](int), defaultdict[int, int](int)
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        owner = owners[piece]
        if filled[owner] and filled[owner] + sizes[piece] > most:
            current[owner], filled[owner] = current[owner] + 1, 0
        filled[owner] += sizes[piece]
        rounds[current[owner]].append(piece)
    return [rounds[number] for number in sorted(rounds)]

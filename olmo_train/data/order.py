"""Data order: which instances each step reads, as pure functions of (seed, step). Only numpy, no index file, no state.

The order is a keyed permutation: a Feistel network keyed by (seed, source, epoch) is a bijection of [0, n) that needs no
memory and can be inverted. So "what was in step 12345" and "which step read instance 9" are arithmetic, a run resumes from
its step alone, and every world size reads the same global batches.

Terms, with 8 instances per step and sources a and b of weights 3 and 1:

    place    index into the endless list of instances that a run reads; step 2, row 5 has place 8 + 5 = 13
    period   PERIOD = 10,000 consecutive places, in which every source has exactly its share: 7,500 of a, 2,500 of b
    visit    the k-th place of a source, counted over the run; if a has n instances, visit k is in its epoch k // n

PermutedOrder.at computes place -> (source, visit) -> (epoch, position in the epoch) -> instance, and places_of goes back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PERIOD = 10_000  # places in which shares are exact: weights have four decimals
KEPT_TABLES = 8  # periods in the cache; a global batch spans one or two
ROUNDS = 8  # of the Feistel network; four already look random, and eight cost microseconds


def key_of(*parts: object) -> np.ndarray:
    """ROUNDS 64-bit round keys that depend on every part."""
    digest = b"".join(hashlib.sha256(f"{part_index}:{parts!r}".encode()).digest() for part_index in range(ROUNDS // 4))
    return np.frombuffer(digest, dtype="<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit of the input reaches every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, key: np.ndarray, bits: int, backwards: bool) -> np.ndarray:
    """A bijection of [0, 2^bits): each round changes one half by a function of the other half, so it can be inverted."""
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    low, high = x & low_mask, x >> low_bits
    for turn in reversed(range(ROUNDS)) if backwards else range(ROUNDS):
        if turn % 2:
            low = low ^ (_mix(high + key[turn]) & low_mask)
        else:
            high = high ^ (_mix(low + key[turn]) & high_mask)
    return (high << low_bits) | low


def permute(x: np.ndarray, n: int, key: np.ndarray, backwards: bool = False) -> np.ndarray:
    """Apply a keyed permutation of [0, n) to each of x; `backwards`: its inverse. x (any shape) -> int64.

    The network permutes the next power of two. A value that lands outside [0, n) is permuted again until it is inside
    (cycle walking, Black and Rogaway 2002), fewer than two times on average.
    """
    bits = max((n - 1).bit_length(), 1)
    result = np.asarray(x).astype(np.uint64)
    shape, result = result.shape, result.ravel()
    outside = np.arange(result.size)
    with np.errstate(over="ignore"):
        while outside.size:
            result[outside] = _feistel(result[outside], key, bits, backwards)
            outside = outside[result[outside] >= n]
    return result.astype(np.int64).reshape(shape)


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Places of each source in one period, (sources,) int64, which sum to PERIOD: shares rounded by largest remainders."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * PERIOD
    places = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - places), kind="stable")[: PERIOD - places.sum()]
    places[largest] += 1
    return places


@dataclass(frozen=True)
class BatchSizes:
    """The global batch size of every step. Maps steps to places and back, so that a change of the batch size neither repeats
    nor drops an instance."""

    changes: tuple[tuple[int, int], ...]  # (first step, sequences a step), in order; the first at step 1

    @classmethod
    def of(cls, changes: Iterable[Sequence[int]]) -> BatchSizes:
        """From pairs as JSON holds them."""
        return cls(tuple((first, size) for first, size in changes))

    @property
    def sizes(self) -> list[int]:
        """The size of each change, in order."""
        return [size for _, size in self.changes]

    def at(self, step: int) -> int:
        """Sequences of this step."""
        return next(size for first, size in reversed(self.changes) if first <= step)

    def places_before(self, step: int) -> int:
        """Instances read before this step, which is also the first place of this step."""
        ends = [first for first, _ in self.changes[1:]] + [step]
        return sum(max(min(end, step) - first, 0) * size for (first, size), end in zip(self.changes, ends, strict=True))

    def row_of(self, place: int) -> tuple[int, int]:
        """(step, row of its global batch) of a place."""
        first, size = next((f, size) for f, size in reversed(self.changes) if self.places_before(f) <= place)
        step, row = divmod(place - self.places_before(first), size)
        return first + step, row

    def steps_for(self, tokens: float, seq_len: int) -> int:
        """The first step after which at least this many tokens have been read."""
        first, size = next((f, size) for f, size in reversed(self.changes) if self.places_before(f) * seq_len < tokens or f == 1)
        return first - 1 + math.ceil((tokens - self.places_before(first) * seq_len) / (size * seq_len))

    def steps_before(self, end: int, tokens: float, seq_len: int) -> int:
        """The fewest last steps, up to and with step `end`, that read at least this many tokens; more than `end` if all steps
        read fewer."""
        place = self.places_before(end + 1) - math.ceil(tokens / seq_len)
        return end + 1 - self.row_of(place)[0] if place >= 0 else end + 1

    def after(self, step: int, then: BatchSizes) -> BatchSizes:
        """These sizes up to `step`, and those of `then` from the next step on."""
        changes = [change for change in self.changes if change[0] <= step]
        for first, size in [(step + 1, then.at(step + 1)), *(change for change in then.changes if change[0] > step + 1)]:
            if not changes or changes[-1][1] != size:
                changes.append((first, size))
        return BatchSizes(tuple(changes))


@dataclass(frozen=True)
class Instances:
    """Instances as arrays of equal length, in the order of places."""

    source: np.ndarray  # int64, index into the sources
    instance: np.ndarray  # int64, within the source
    epoch: np.ndarray  # int64, how often the source has been read completely before

    def __getitem__(self, rows: slice | np.ndarray) -> Instances:
        return Instances(self.source[rows], self.instance[rows], self.epoch[rows])

    def __len__(self) -> int:
        return len(self.source)


class PermutedOrder:
    """`order: permute`: sources mixed by weight; each epoch of each source has a separate permutation.

    sizes: instances of each source. stages: [(first place, weights)], the first at place 0; a stage sets the mix from its first
    place on. The order does not depend on the length of the run.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]], seed: int):
        self.names, self.sizes, self.seed = list(names), np.asarray(sizes, dtype=np.int64), seed
        self.starts = np.array([start for start, _ in stages], dtype=np.int64)
        self.quotas = [quotas(weights) for _, weights in stages]
        self._tables: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.visited = [np.zeros(len(names), dtype=np.int64)]  # visits of each source before each stage
        for stage, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            self.visited.append(self.visited[-1] + self._count(stage, end - start))

    def at(self, places: np.ndarray) -> Instances:
        """The instances at these places (any 1-D array of int64)."""
        source, visit = self._visits(places)
        epoch, position = np.divmod(visit, self.sizes[source])
        instance = np.empty_like(position)
        for s in np.unique(source):
            for e in np.unique(epoch[source == s]):
                rows = (source == s) & (epoch == e)
                instance[rows] = permute(position[rows], int(self.sizes[s]), self._epoch_key(int(s), int(e)))
        return Instances(source, instance, epoch)

    def places_of(self, source: int, instance: int, last_place: int) -> np.ndarray:
        """Every place below `last_place` at which the instance is read: one per epoch."""
        n, visits, places = int(self.sizes[source]), int(self.visits_before(last_place)[source]), []
        for epoch in range(-(-visits // n)):
            position = permute(np.array([instance]), n, self._epoch_key(source, epoch), backwards=True)[0]
            visit = epoch * n + int(position)
            if visit < visits:  # later visits may never happen, if a stage leaves the source out
                places.append(self._place_of_visit(source, visit))
        return np.array(places, dtype=np.int64)

    def visits_before(self, place: int) -> np.ndarray:
        """Visits of each source before this place, (sources,); divided by its size: its epochs."""
        stage = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.visited[stage] + self._count(stage, place - int(self.starts[stage]))

    def _visits(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, visit) of each place."""
        places = np.asarray(places, dtype=np.int64)
        source, visit = np.empty_like(places), np.empty_like(places)
        stage_of = np.searchsorted(self.starts, places, side="right") - 1
        period_of, offset = np.divmod(places - self.starts[stage_of], PERIOD)
        for stage, period in {(int(s), int(p)) for s, p in zip(stage_of, period_of, strict=True)}:
            rows = (stage_of == stage) & (period_of == period)
            owner, nth = self._table(stage, period)
            source[rows] = owner[offset[rows]]
            before = self.visited[stage] + period * self.quotas[stage]
            visit[rows] = before[source[rows]] + nth[offset[rows]]
        return source, visit

    def _place_of_visit(self, source: int, visit: int) -> int:
        # The last stage that starts at or before this visit, among those that have the source: a stage without it starts at
        # the same visit as the next stage.
        stage = max(s for s, visited in enumerate(self.visited) if visited[source] <= visit and self.quotas[s][source])
        period, nth = divmod(visit - int(self.visited[stage][source]), int(self.quotas[stage][source]))
        offset = np.flatnonzero(self._table(stage, period)[0] == source)[nth]
        return int(self.starts[stage]) + period * PERIOD + int(offset)

    def _count(self, stage: int, length: int) -> np.ndarray:
        """Visits of each source in the first `length` places of a stage."""
        periods, rest = divmod(int(length), PERIOD)
        part = np.bincount(self._table(stage, periods)[0][:rest], minlength=len(self.names))
        return periods * self.quotas[stage] + part

    def _table(self, stage: int, period: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each place of the period, number of earlier places of that source in the period)."""
        if (stage, period) not in self._tables:
            slots = permute(np.arange(PERIOD), PERIOD, key_of("period", self.seed, stage, period))
            owner = np.searchsorted(np.cumsum(self.quotas[stage]), slots, side="right")
            by_owner = np.argsort(owner, kind="stable")
            nth = np.empty(PERIOD, dtype=np.int64)
            nth[by_owner] = np.arange(PERIOD) - np.repeat(np.cumsum(self.quotas[stage]) - self.quotas[stage], self.quotas[stage])
            if len(self._tables) >= KEPT_TABLES:
                del self._tables[next(iter(self._tables))]  # the oldest
            self._tables[stage, period] = owner, nth
        return self._tables[stage, period]

    def _epoch_key(self, source: int, epoch: int) -> np.ndarray:
        return key_of("epoch", self.seed, self.names[source], epoch)


class OlmoOrder:
    """`order: olmo`: allenai/OLMo's own shuffle, bit for bit (olmo/data/iterable_dataset.py).

    The sources are concatenated into one list of instances. Epoch e is that list shuffled by PCG64(seed + e); the incomplete
    global batch at its end is dropped. It needs four bytes of memory per instance, as in OLMo.
    """

    def __init__(self, sizes: Sequence[int], batches: BatchSizes, seed: int):
        self.ends, self.seed = np.cumsum(sizes), seed
        # Rows of (first place, its epoch, its position there, positions of an epoch).
        self._stretches = np.zeros((0, 4), dtype=np.int64)
        for first, size in batches.changes:
            self._change(batches.places_before(first), size)
        self._shuffled: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.uint32))

    def at(self, places: np.ndarray) -> Instances:
        """The instances at these places (any 1-D array of int64)."""
        epoch, position = self._positions(np.asarray(places, dtype=np.int64))
        flat = np.empty_like(position)
        for e in np.unique(epoch):
            flat[epoch == e] = self._shuffle(int(e))[position[epoch == e]]
        source = np.searchsorted(self.ends, flat, side="right")
        return Instances(source, flat - np.concatenate(([0], self.ends))[source], epoch)

    def places_of(self, source: int, instance: int, last_place: int) -> np.ndarray:
        """Every place below `last_place` at which the instance is read: at most one per epoch."""
        flat = instance + (int(self.ends[source - 1]) if source else 0)
        first_place, first_epoch, first_position, length = self._stretches.T
        places = []
        for epoch in range(int(self._positions(np.array([last_place]))[0][0]) + 1):
            position = int(np.flatnonzero(self._shuffle(epoch) == flat)[0])
            candidates = first_place + (epoch - first_epoch) * length + position - first_position
            candidates = candidates[candidates >= 0]
            of, at = self._positions(candidates)  # differs if this epoch dropped the instance
            places += candidates[(of == epoch) & (at == position)].tolist()
        return np.array([place for place in sorted({*places}) if place < last_place], dtype=np.int64)

    def visits_before(self, place: int) -> np.ndarray:
        """Mean visits of each source before this place: exact at an epoch's end."""
        sizes = np.diff(self.ends, prepend=0).tolist()  # Python's integers: the products may not fit in int64
        return np.array([size * place // int(self.ends[-1]) for size in sizes], dtype=np.int64)

    def _change(self, place: int, size: int) -> None:
        """From this place on, `size` instances per step. The current epoch continues for as many full batches as it has."""
        n = int(self.ends[-1])
        epoch, position = 0, 0
        stretches = [row for row in self._stretches.tolist() if row[0] < place]
        if stretches:
            epoch, position = (int(values[0]) for values in self._positions(np.array([place - 1])))
            position += 1
            stretches.append([place, epoch, position, n])
            place, epoch = place + (n - position) // size * size, epoch + 1
        stretches = [row for row in stretches if row[0] < place]
        self._stretches = np.array([*stretches, [place, epoch, 0, n // size * size]], dtype=np.int64)

    def _positions(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, position in its shuffle) of each place."""
        stretch = np.searchsorted(self._stretches[:, 0], places, side="right") - 1
        first_place, first_epoch, first_position, length = self._stretches[stretch].T
        epochs, position = np.divmod(first_position + places - first_place, length)
        return first_epoch + epochs, position

    def _shuffle(self, epoch: int) -> np.ndarray:
        if self._shuffled[0] != epoch:
            indices = np.arange(self.ends[-1], dtype=np.uint32)
            np.random.Generator(np.random.PCG64(self.seed + epoch)).shuffle(indices)
            self._shuffled = (epoch, indices)
        return self._shuffled[1]

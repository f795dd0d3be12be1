"""Documents as tokens, between the tokenizer and the writer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from olmo_train.data.meta import BEGINS


@dataclass
class Tokenized:
    """Documents as tokens, each followed by its EOS and, in packed windows, by padding."""

    tokens: np.ndarray  # (n,) of the tokenizer's dtype
    lengths: np.ndarray  # (documents,) tokens of each, EOS not included
    mask: np.ndarray | None  # (n,) uint8, as in label files (see data/meta.py); None: all ones
    ids: list[str]
    origins: list[str]
    records: list[int | None]
    bytes: np.ndarray  # (documents,) UTF-8 bytes of the text
    padding: np.ndarray  # (documents,) tokens after the EOS of each

    def __len__(self) -> int:
        return len(self.ids)

    def ends(self) -> np.ndarray:
        """(documents,) the end of each in `tokens`, EOS and padding included."""
        return np.cumsum(self.lengths + 1 + self.padding)

    def part(self, low: int, high: int) -> Tokenized:
        """Documents [low, high)."""
        ends = np.concatenate([[0], self.ends()])
        span = slice(int(ends[low]), int(ends[high]))
        mask = None if self.mask is None else self.mask[span]
        lists = [values[low:high] for values in (self.ids, self.origins, self.records)]
        arrays = (self.bytes[low:high], self.padding[low:high])
        return Tokenized(self.tokens[span], self.lengths[low:high], mask, *lists, *arrays)  # type: ignore[call-arg]

    def each(self) -> Iterator[Tokenized]:
        """The documents one by one, as copies: a slice would keep the whole array in memory."""
        start = 0
        for i, end in enumerate(self.ends().tolist()):
            span, one = slice(start, end), slice(i, i + 1)
            arrays = (self.tokens[span].copy(), self.lengths[one].copy(), self.mask[span].copy())
            about = (self.ids[one], self.origins[one], self.records[one], self.bytes[one].copy(), self.padding[one].copy())
            yield Tokenized(*arrays, *about)
            start = end

    def padded(self, tokens: int, eos_id: int) -> Tokenized:
        """The same documents, the last one followed by more padding, which is unscored and counts as a document."""
        padding, mask = self.padding.copy(), np.zeros(tokens, np.uint8)
        padding[-1] += tokens
        mask[:1] = BEGINS
        fill = np.full(tokens, eos_id, self.tokens.dtype)
        whole = np.concatenate([self.tokens, fill]), self.lengths, np.concatenate([self.mask, mask])
        return Tokenized(*whole, self.ids, self.origins, self.records, self.bytes, padding)


def joined(parts: Sequence[Tokenized]) -> Tokenized:
    """The documents of several parts, all with a mask, in order."""
    names = ("tokens", "lengths", "mask", "bytes", "padding")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    lists = {name: [value for part in parts for value in getattr(part, name)] for name in ("ids", "origins", "records")}
    return Tokenized(**arrays, **lists)

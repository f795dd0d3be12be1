"""documents.parquet: which document each token belongs to, for billions of rows.

Rows are in token order, in row groups that never cross a shard. A bisection of the groups' statistics finds the row group of a
position, and only that group is read. Ids are looked up in documents.ids, an array of (hash of the id, position) sorted by hash.
pyarrow is imported only when a table is opened.
"""

from __future__ import annotations

import difflib
import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from olmo_train.data.meta import PREPARE_AGAIN
from olmo_train.errors import DataError, reason

DOCUMENTS_FILE = "documents.parquet"
IDS_FILE = "documents.ids"
ID_DTYPE = np.dtype([("hash", "<u8"), ("start", "<i8")])  # start: position in the stream
LIKE_ROWS, LIKE_GROUPS = 20_000, 16  # an unknown id is compared with at most this many ids of this many row groups
SCAN_TOKENS = 2**22  # how far a raw file is scanned for an EOS before and after a span


@dataclass(frozen=True)
class Document:
    """A document of a source, as a span of tokens."""

    id: str | None  # the record's own id, else origin:record; None in raw files
    origin: str  # source file, with :record where the file holds several
    start: int  # position of its first token, in the stream or in the shard
    end: int  # exclusive, before its EOS
    denied: bool = False  # by data.deny: its tokens are no labels in training

    def shifted(self, by: int) -> Document:
        """The document with positions that are `by` higher."""
        return replace(self, start=self.start + by, end=self.end + by)


def id_hash(id: str) -> int:
    """64 bits of the id's BLAKE2b hash."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def scan_documents(tokens: np.ndarray, start: int, stop: int, eos_id: int, origin: str) -> list[Document]:
    """The documents of a raw file that overlap [start, stop), found by its EOS tokens. A document ends at the end of its file.

    Scans at most SCAN_TOKENS to either side: a longer document is cut there.
    """
    low = _after_last_eos(tokens, max(start - SCAN_TOKENS, 0), start, eos_id)
    found, begin = [], low
    for end in (np.flatnonzero(tokens[low:stop] == eos_id) + low).tolist():
        found.append(Document(None, origin, begin, end))
        begin = end + 1
    if begin < stop:
        rest = np.flatnonzero(tokens[stop : stop + SCAN_TOKENS] == eos_id)
        end = stop + int(rest[0]) if len(rest) else min(stop + SCAN_TOKENS, len(tokens))
        found.append(Document(None, origin, begin, end))
    return found


def _after_last_eos(tokens: np.ndarray, low: int, start: int, eos_id: int) -> int:
    """Where the document that holds position `start` begins, not before `low`; searched backwards in growing steps."""
    stop, step = start, 4096
    while stop > low:
        begin = max(stop - step, low)
        hits = np.flatnonzero(tokens[begin:stop] == eos_id)
        if len(hits):
            return begin + int(hits[-1]) + 1
        stop, step = begin, step * 4
    return low


class DocumentTable:
    """documents.parquet and documents.ids of a prepared folder, opened for lookups."""

    def __init__(self, folder: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = folder
        self.file = folder / DOCUMENTS_FILE
        try:
            self._parquet = pq.ParquetFile(self.file, memory_map=True)
        except (OSError, pa.ArrowException) as problem:
            raise DataError(self.file, f"cannot be read: {reason(problem)}; {PREPARE_AGAIN}") from problem
        names = self._parquet.schema_arrow.names
        self._shard, self._start = names.index("shard"), names.index("start")

    @property
    def n_documents(self) -> int:
        """Rows of the table."""
        return self._parquet.metadata.num_rows

    def _group_key(self, group: int) -> tuple[int, int]:
        """(shard, start) of the first row of a row group."""
        row_group = self._parquet.metadata.row_group(group)
        return row_group.column(self._shard).statistics.min, row_group.column(self._start).statistics.min

    def _group_of(self, shard: int, position: int) -> int:
        """The row group of the document that holds this position of a shard."""
        groups = range(self._parquet.num_row_groups)
        return max(bisect_right(groups, (shard, position), key=self._group_key) - 1, 0)

    def overlapping(self, shard: int, start: int, stop: int) -> list[Document]:
        """The documents that overlap [start, stop) of a shard, in order; their positions are in the shard."""

        def rows(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
            # `end` is the position of the EOS, which belongs to the document
            return np.arange(np.searchsorted(ends, start, side="left"), np.searchsorted(starts, stop, side="left"))

        found = []
        for group in range(self._group_of(shard, start), self._parquet.num_row_groups):
            key = self._group_key(group)
            if key >= (shard, stop):
                break
            if key[0] == shard:
                found += self._documents(group, rows)
        return found

    def _documents(self, group: int, rows: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[Document]:
        """The documents in the rows of a row group that `rows(starts, ends)` returns."""
        table = self._parquet.read_row_group(group, columns=["id", "start", "end", "origin", "record"])
        chosen = table.take(rows(table["start"].to_numpy(), table["end"].to_numpy()))
        return [Document(row["id"], _origin(row), row["start"], row["end"]) for row in chosen.to_pylist()]

    def spans(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents of the shard,) their starts and ends. Raises DataError."""
        import pyarrow as pa

        groups = range(self._parquet.num_row_groups)
        low, high = (bisect_left(groups, (s, -1), key=self._group_key) for s in (shard, shard + 1))
        try:
            table = self._parquet.read_row_groups(list(range(low, high)), columns=["start", "end"])
        except (OSError, pa.ArrowException) as problem:
            raise DataError(self.file, f"cannot be read: {reason(problem)}; {PREPARE_AGAIN}") from problem
        return table["start"].to_numpy(), table["end"].to_numpy()

    @cached_property
    def _ids(self) -> np.ndarray:
        file = self.folder / IDS_FILE
        try:
            return np.memmap(file, ID_DTYPE, mode="r")
        except (OSError, ValueError) as problem:
            raise DataError(file, f"cannot be read: {reason(problem)}; {PREPARE_AGAIN}") from problem

    def find(self, ids: set[str], shard_starts: list[int]) -> list[Document]:
        """Every document of these ids, in order; their positions are in the stream. Each row group is read once.

        Raises DataError when an id is unknown.
        """
        wanted: dict[int, dict[int, str]] = {}  # row group: {start in the shard: id}
        for id in ids:
            for start in self._starts_of(id):
                shard = bisect_right(shard_starts, start) - 1
                local = start - shard_starts[shard]
                wanted.setdefault(self._group_of(shard, local), {})[local] = id
        found = []
        for group, starts in sorted(wanted.items()):
            base = shard_starts[self._group_key(group)[0]]
            documents = self._documents(group, lambda column, _, starts=starts: np.searchsorted(column, sorted(starts)))
            found += [d.shifted(base) for d in documents if starts.get(d.start) == d.id]
        if missing := ids - {document.id for document in found}:
            raise DataError(self.file, f"knows no document '{min(missing)}'; {self._nearest(min(missing))}")
        return found

    def _starts_of(self, id: str) -> list[int]:
        """Positions in the stream of the documents whose id has this one's hash."""
        hashes, wanted = self._ids["hash"], id_hash(id)  # bisect reads few of them; np.searchsorted would copy all
        low = bisect_left(hashes, wanted)
        return self._ids["start"][low : bisect_right(hashes, wanted, lo=low)].tolist()

    def _nearest(self, id: str) -> str:
        """Known ids that resemble this one, among at most LIKE_ROWS ids of the source."""
        groups = range(0, self._parquet.num_row_groups, -(-self._parquet.num_row_groups // LIKE_GROUPS))
        columns = [self._parquet.read_row_group(group, columns=["id"])["id"][: LIKE_ROWS // len(groups)] for group in groups]
        known = [known for column in columns for known in column.to_pylist()]
        near = difflib.get_close_matches(id, known, n=3, cutoff=0.6)
        return f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else f"an id of it is {known[0]!r}"


def _origin(row: dict) -> str:
    return row["origin"] if row["record"] is None else f"{row['origin']}:{row['record']}"

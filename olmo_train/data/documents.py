"""documents.parquet: which document each token is of, usable at billions of rows.

The one idea: rows lie in the order of the tokens, in row groups that never cross a shard, so the row group of a position
is found by bisecting the groups' statistics, and only that group is read. Ids are found through documents.ids, an array
of (hash of the id, position) sorted by hash. pyarrow is imported only when a table is opened or written.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from olmo_train.errors import DataError

DOCUMENTS_FILE = "documents.parquet"
IDS_FILE = "documents.ids"
ID_DTYPE = np.dtype([("hash", "<u8"), ("start", "<i8")])  # start: position in the stream
SCAN_TOKENS = 2**22  # how far a raw file is scanned for an EOS before and after a span


@dataclass(frozen=True)
class Document:
    id: str | None  # the record's own id, else origin:record; None in raw files
    origin: str  # source file, with :record where the file holds several
    start: int  # of its first token; in the stream, or in the shard where a shard is spoken of
    end: int  # exclusive, before its EOS

    def shifted(self, by: int) -> Document:
        return replace(self, start=self.start + by, end=self.end + by)


def id_hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def scan_documents(tokens: np.ndarray, start: int, stop: int, eos_id: int, origin: str) -> list[Document]:
    """The documents of a raw file that overlap [start, stop), by its EOS tokens.

    Looks at most SCAN_TOKENS to either side: a longer document is cut there. A file's border is a document's border.
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
    """Where the document that holds position `start` begins, at the earliest `low`; searched backwards in growing steps."""
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
            raise DataError(self.file, f"cannot be read: {problem}; prepare the source again") from problem
        names = self._parquet.schema_arrow.names
        self._shard, self._start = names.index("shard"), names.index("start")

    @property
    def n_documents(self) -> int:
        return self._parquet.metadata.num_rows

    def _group_key(self, group: int) -> tuple[int, int]:
        row_group = self._parquet.metadata.row_group(group)
        return row_group.column(self._shard).statistics.min, row_group.column(self._start).statistics.min

    def overlapping(self, shard: int, start: int, stop: int) -> list[Document]:
        """The documents that overlap [start, stop) of a shard, in order, positions in the shard."""
        groups = range(self._parquet.num_row_groups)
        group = max(bisect_right(groups, (shard, start), key=self._group_key) - 1, 0)
        found = []
        while group < len(groups) and self._group_key(group) < (shard, stop):
            if self._group_key(group)[0] == shard:
                found += self._rows(group, start, stop)
            group += 1
        return found

    def _rows(self, group: int, start: int, stop: int) -> list[Document]:
        spans = self._parquet.read_row_group(group, columns=["start", "end"])
        starts, ends = spans["start"].to_numpy(), spans["end"].to_numpy()
        low = int(
            np.searchsorted(ends, start, side="left")
        )  # `end` is the place of the EOS, which counts as the document's
        high = int(np.searchsorted(starts, stop, side="left"))
        if low >= high:
            return []
        texts = (
            self._parquet.read_row_group(group, columns=["id", "origin", "record"]).slice(low, high - low).to_pylist()
        )
        return [
            Document(row["id"], _origin(row), int(s), int(e))
            for row, s, e in zip(texts, starts[low:high], ends[low:high], strict=True)
        ]

    @cached_property
    def _ids(self) -> np.ndarray:
        file = self.folder / IDS_FILE
        try:
            return np.memmap(file, ID_DTYPE, mode="r")
        except (OSError, ValueError) as problem:
            raise DataError(file, f"cannot be read: {problem}; prepare the source again") from problem

    def find(self, id: str, shard_starts: list[int]) -> Document:
        """The first document of that id, positions in the stream. Raises DataError when there is none."""
        wanted = id_hash(id)
        for at in range(bisect_left(self._ids["hash"], wanted), len(self._ids)):
            if int(self._ids["hash"][at]) != wanted:
                break
            start = int(self._ids["start"][at])
            shard = bisect_right(shard_starts, start) - 1
            local = start - shard_starts[shard]
            for document in self.overlapping(shard, local, local + 1):
                if document.id == id and document.start == local:
                    return document.shifted(shard_starts[shard])
        raise DataError(self.file, f"knows no document '{id}'; ids stand in its column id")


def _origin(row: dict) -> str:
    return row["origin"] if row["record"] is None else f"{row['origin']}:{row['record']}"

"""Write the documents.parquet and documents.ids of a source, part by part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmo_train.data.documents import DOCUMENTS_FILE, ID_DTYPE, IDS_FILE, id_hash

if TYPE_CHECKING:
    import pyarrow as pa


COLUMNS = ("id", "shard", "start", "end", "origin", "record")
GROUP_ROWS = 2**18  # most rows of a row group, which one lookup reads
SORT_ROWS = 2**22  # ids to sort in memory at once


class DocumentParts:
    """Rows for documents.parquet, in numbered files of `work` until `merge` joins them.

    Row groups depend on shards and GROUP_ROWS alone, not on when rows were saved.
    """

    def __init__(self, work: Path, parts: int):
        self.work, self.parts, self.rows = work, parts, 0
        self._columns: dict[str, list] = {name: [] for name in COLUMNS}

    def add(self, shard: int, ids: list, starts: np.ndarray, ends: np.ndarray, origins: list, records: list) -> None:
        """Add rows of documents. starts and ends are positions in the shard, without the EOS."""
        values = (ids, [shard] * len(ids), starts.tolist(), ends.tolist(), origins, records)
        for name, column in zip(COLUMNS, values, strict=True):
            self._columns[name].extend(column)
        self.rows += len(ids)

    def save(self) -> int:
        """Write the rows in memory to the disk; returns the number of parts on it."""
        import pyarrow.parquet as pq

        if self.rows:
            file = self._file(self.parts)
            with open(file, "wb") as stream:
                pq.write_table(_table(self._columns), stream)
                stream.flush()
                os.fsync(stream.fileno())
            self.parts, self.rows, self._columns = self.parts + 1, 0, {name: [] for name in COLUMNS}
        return self.parts

    def _file(self, part: int) -> Path:
        return self.work / f"documents-{part:06d}.parquet"

    def merge(self, folder: Path, shard_tokens: list[int]) -> tuple[int, int]:
        """Write documents.parquet and documents.ids; returns the numbers of documents and of their tokens, without EOS."""
        import pyarrow.parquet as pq

        assert not self.rows, "save() comes before merge()"
        starts = np.cumsum([0, *shard_tokens], dtype=np.int64)
        rows = tokens = 0
        ids = _IdsFile(self.work)
        options = {"compression": "zstd", "use_dictionary": ["origin", "shard"]}
        options["column_encoding"] = dict.fromkeys(("start", "end", "record"), "DELTA_BINARY_PACKED")
        with pq.ParquetWriter(folder / DOCUMENTS_FILE, _schema(), **options) as writer:
            for group in self._groups():
                writer.write_table(group, row_group_size=GROUP_ROWS)
                begin, end = group["start"].to_numpy(), group["end"].to_numpy()
                ids.add(group["id"].to_pylist(), begin + starts[group["shard"].to_numpy()])
                rows, tokens = rows + len(group), tokens + int((end - begin).sum())
        ids.merge(folder / IDS_FILE)
        return rows, tokens

    def _groups(self) -> Iterator[pa.Table]:
        """The rows of all parts as tables of one shard and at most GROUP_ROWS rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        waiting = _table({name: [] for name in COLUMNS})
        for part in range(self.parts):
            waiting = pa.concat_tables([waiting, pq.read_table(self._file(part), schema=_schema())]).combine_chunks()
            while len(waiting):
                shards = waiting["shard"].to_numpy()
                same = int(np.searchsorted(shards, shards[0], side="right"))
                if same == len(shards) < GROUP_ROWS and part + 1 < self.parts:
                    break  # more rows of this shard may follow
                yield waiting.slice(0, min(same, GROUP_ROWS))
                waiting = waiting.slice(min(same, GROUP_ROWS))


class _IdsFile:
    """Sorts (hash, position) of billions of ids with bucket files, each small enough to sort in memory."""

    def __init__(self, work: Path):
        self.work, self.rows = work, [np.empty(0, ID_DTYPE)]
        self.buckets: list[Path] = []

    def add(self, ids: list[str], starts: np.ndarray) -> None:
        rows = np.empty(len(ids), ID_DTYPE)
        rows["hash"] = np.fromiter(map(id_hash, ids), np.uint64, len(ids))
        rows["start"] = starts
        self.rows.append(rows)
        if sum(map(len, self.rows)) >= SORT_ROWS:
            self._spill()

    def _spill(self) -> None:
        """Append each row in memory to the bucket file of the first byte of its hash."""
        if not self.buckets:
            self.buckets = [self.work / f"ids-{bucket:03d}" for bucket in range(256)]
            for file in self.buckets:
                file.unlink(missing_ok=True)
        rows = np.sort(np.concatenate(self.rows), order=("hash", "start"))
        bounds = np.searchsorted(rows["hash"] >> np.uint64(56), np.arange(257))
        for bucket, file in enumerate(self.buckets):
            with open(file, "ab") as stream:
                rows[bounds[bucket] : bounds[bucket + 1]].tofile(stream)
        self.rows = [rows[:0]]

    def merge(self, file: Path) -> None:
        """Write all rows to `file`, sorted."""
        if self.buckets:
            self._spill()
        with open(file, "wb") as stream:
            parts = (np.fromfile(bucket, ID_DTYPE) for bucket in self.buckets) if self.buckets else [np.concatenate(self.rows)]
            for rows in parts:
                np.sort(rows, order=("hash", "start")).tofile(stream)


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = (pa.string(), pa.int32(), pa.int64(), pa.int64(), pa.string(), pa.int64())
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def _table(columns: dict[str, list]) -> pa.Table:
    import pyarrow as pa

    return pa.table(columns, schema=_schema())

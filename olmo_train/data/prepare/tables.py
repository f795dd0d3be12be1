"""Read Parquet and Arrow files as chunks of rows; only the columns that a record needs are read.

Memory holds one chunk of rows at a time, however large the row groups are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train.data.prepare.chunks import CHUNK_BYTES, BreaksOff, Piece

if TYPE_CHECKING:
    import pyarrow as pa

FILE_BREAKS_OFF = "the file breaks off"  # reason
# (rows or 0 where unknown, batches of rows, how many bytes of the file were read)
Opened = tuple[int, "Iterator[pa.RecordBatch]", Callable[[], int]]


def cut(open_table: Callable[[Path, tuple[str, ...]], Opened], path: Path, columns: tuple[str, ...]) -> Iterator[Piece]:
    """Pieces of about CHUNK_BYTES of rows. Raises BreaksOff where the file is damaged."""
    import pyarrow as pa

    size, total, done = path.stat().st_size, 0, 0
    try:
        total, batches, position = open_table(path, columns)
        for batch in batches:
            rows = max(1, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, 1))
            for start in range(0, batch.num_rows, rows):
                piece = batch.slice(start, rows)
                done += piece.num_rows
                yield Piece(_pack(piece), piece.num_rows, piece.num_rows, size * done // total if total else position())
    except (pa.ArrowException, OSError, EOFError, ValueError) as problem:
        raise BreaksOff(problem, size, FILE_BREAKS_OFF, max(total - done, 1)) from problem


def rows(payload: bytes) -> list[dict[str, Any] | Exception]:
    """The rows of a chunk. A row that Python cannot hold (not UTF-8, an impossible time) is replaced by the exception."""
    import pyarrow as pa

    table = pa.ipc.open_stream(payload).read_all()
    try:
        return table.to_pylist()
    except Exception:  # of many kinds
        return [_row(table.slice(i, 1)) for i in range(len(table))]


def _row(table: pa.Table) -> dict[str, Any] | Exception:
    try:
        return table.to_pylist()[0]
    except Exception as problem:
        return problem


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch. Raises ArrowInvalid on offsets and indices out of range, which would crash the process later."""
    import pyarrow as pa

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as problem:
            if "UTF8" not in str(problem):  # `rows` leaves out such a row alone
                raise
    return batch


def _pack(batch: pa.RecordBatch) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def open_parquet(path: Path, columns: tuple[str, ...]) -> Opened:
    """A Parquet file, read as a stream: a row group is not loaded completely."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False)
    metadata = file.metadata
    names = [name for name in file.schema_arrow.names if name in columns] or file.schema_arrow.names
    uncompressed = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    batch_rows = max(1, metadata.num_rows * CHUNK_BYTES // max(uncompressed, 1))
    batches = file.iter_batches(min(batch_rows, 2**16), columns=names, use_threads=False)
    return metadata.num_rows, batches, lambda: 0  # without rows, all bytes are the end's


def open_arrow(path: Path, columns: tuple[str, ...]) -> Opened:
    """An Arrow file of either kind, file or stream (`datasets` writes streams); its number of rows is unknown."""
    import pyarrow as pa

    source = pa.OSFile(str(path))  # no memory map: pages that were read would count as memory in use
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    schema = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).schema
    names = [name for name in schema.names if name in columns] or schema.names
    options = pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in names], use_threads=False)
    source.seek(0)
    if not is_file:
        return 0, map(_validated, pa.ipc.open_stream(source, options=options)), source.tell
    reader = pa.ipc.open_file(source, options=options)
    return 0, map(_validated, map(reader.get_batch, range(reader.num_record_batches))), source.tell

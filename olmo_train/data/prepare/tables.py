"""Read Parquet and Arrow files as chunks of rows; only the columns that a record needs are read.

Memory holds one chunk of rows at a time, however large the row groups are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train.data.prepare.chunks import CHUNK_BYTES, BreaksOff, Chunk

if TYPE_CHECKING:
    import pyarrow as pa

FILE_BREAKS_OFF = "the file breaks off"  # reason


def cut(format: str, path: Path, origin: str, size: int, columns: tuple[str, ...]) -> Iterator[Chunk]:
    """Chunks of about CHUNK_BYTES of rows. For a damaged file the last chunk holds the error."""
    import pyarrow as pa

    first, reported, total = 1, 0, 0
    try:
        total, batches, position = READERS[format](path, columns)
        for batch in batches:
            if format == "arrow":
                _validate(batch)
            rows = max(1, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, 1))
            for start in range(0, batch.num_rows, rows):
                piece = batch.slice(start, rows)
                done = size * (first + piece.num_rows - 1) // total if total else min(max(position(), reported), size)
                yield Chunk(format, origin, first, _pack(piece), piece.num_rows, done - reported)
                first, reported = first + piece.num_rows, done
    except (pa.ArrowException, OSError, EOFError, ValueError) as problem:
        broken = BreaksOff(problem, size, FILE_BREAKS_OFF)
        broken.records = max(total - first + 1, 1)
        yield broken.chunk(format, origin, first)


def rows(chunk: Chunk) -> list[dict[str, Any] | Exception]:
    """The rows of a chunk; in place of one that Python cannot hold (no UTF-8, an impossible time), why."""
    import pyarrow as pa

    table = pa.ipc.open_stream(chunk.payload).read_all()
    try:
        return table.to_pylist()
    except Exception:  # of many kinds
        return [_row(table.slice(i, 1)) for i in range(len(table))]


def _row(table: pa.Table) -> dict[str, Any] | Exception:
    try:
        return table.to_pylist()[0]
    except Exception as problem:
        return problem


def _validate(batch: pa.RecordBatch) -> None:
    """Raises ArrowInvalid on offsets and indices that point outside: reading on would end the process."""
    import pyarrow as pa

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as problem:
            if "UTF8" not in str(problem):  # such a row is left out alone
                raise


def _pack(batch: pa.RecordBatch) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _read_parquet(path: Path, columns: tuple[str, ...]) -> tuple[int, Iterator[pa.RecordBatch], Callable[[], int] | None]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False)  # streams: does not load a whole row group
    metadata = file.metadata
    names = [name for name in file.schema_arrow.names if name in columns] or file.schema_arrow.names
    uncompressed = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    batch_rows = max(1, metadata.num_rows * CHUNK_BYTES // max(uncompressed, 1))
    return metadata.num_rows, file.iter_batches(min(batch_rows, 2**16), columns=names, use_threads=False), None


def _read_arrow(path: Path, columns: tuple[str, ...]) -> tuple[int, Iterator[pa.RecordBatch], Callable[[], int] | None]:
    """Both kinds of Arrow file: `datasets` writes the stream kind. The number of rows is not known beforehand (0)."""
    import pyarrow as pa

    source = pa.OSFile(str(path))  # no memory map: pages that were read would count as memory in use
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    schema = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).schema
    names = [name for name in schema.names if name in columns] or schema.names
    options = pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in names], use_threads=False)
    source.seek(0)
    if not is_file:
        return 0, iter(pa.ipc.open_stream(source, options=options)), source.tell
    reader = pa.ipc.open_file(source, options=options)
    return 0, (reader.get_batch(i) for i in range(reader.num_record_batches)), source.tell


READERS = {"parquet": _read_parquet, "arrow": _read_arrow}

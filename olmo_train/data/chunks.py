"""A piece of an input file that travels to a worker, and the opening of compressed files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Chunk:
    format: str
    origin: str
    first: int  # number of its first record, from 1
    payload: Any  # lines, an Arrow stream, or the names of text files
    input_bytes: int  # bytes of the input that it stands for, compressed ones as such: for progress
    problem: str | None = None  # the file breaks off here


def open_stream(path: Path, raw: BinaryIO) -> BinaryIO:
    """`raw`, decompressed when the name ends in .gz or .zst. Reading raises OSError when the data is damaged."""
    if path.suffix not in (".gz", ".zst"):
        return raw
    import pyarrow as pa

    return pa.CompressedInputStream(raw, {".gz": "gzip", ".zst": "zstd"}[path.suffix])

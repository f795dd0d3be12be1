"""A piece of an input file that travels to a worker, and the opening of compressed files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 2**20
BREAKS_OFF = "the file breaks off"


@dataclass(frozen=True)
class Skipped:
    """What did not become a document. The account in meta.json counts it under `reason`."""

    where: str  # file:record
    reason: str
    detail: str = ""  # what to add to the reason, its punctuation included
    size: int = 0  # of its chunk's `content`
    records: int = 1

    @property
    def why(self) -> str:
        return self.reason + self.detail


@dataclass(frozen=True)
class Chunk:
    format: str
    origin: str
    first: int  # number of its first record, from 1
    payload: Any  # lines, an Arrow stream, or the names of text files
    content: int  # size of the payload: bytes of lines or text files, or rows
    input_bytes: int  # bytes on disk that it stands for; those of all chunks of a file sum to its size
    problem: Skipped | None = None  # instead of a payload: nothing more can be read from the file, because of this


def broken(format: str, origin: str, first: int, problem: Exception, records: int = 1) -> Chunk:
    """The last chunk of a file that breaks off: record `first` and what follows is lost."""
    why = " ".join(str(problem).split())
    return Chunk(format, origin, first, b"", 1, 0, Skipped(f"{origin}:{first}", BREAKS_OFF, f" here: {why}", 1, records))


def open_stream(path: Path, raw: BinaryIO) -> BinaryIO:
    """`raw`, decompressed when the name ends in .gz or .zst. Reading raises OSError when the data is damaged."""
    if path.suffix not in (".gz", ".zst"):
        return raw
    import pyarrow as pa

    return pa.CompressedInputStream(raw, {".gz": "gzip", ".zst": "zstd"}[path.suffix])

"""Pieces of input files that travel to workers, and the opening of compressed files."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from olmo_train.errors import reason as reason_of

CHUNK_BYTES = 2**20
SIP_BYTES = 2**12  # of a .zst file, read at once
INPUT_BYTES = 2**14  # of a .gz file, read at once
BREAKS_OFF = "the compressed stream breaks off"  # reasons
OTHER = "zero padding, or something else"
TRAILING = "bytes after the end of the compressed data"


@dataclass(frozen=True)
class Unit:
    """What is read as one sequence of records: one file of records, or several text files that fill a chunk."""

    format: str
    files: tuple[Path, ...]
    origins: tuple[str, ...]  # the files as the user would name them
    sizes: tuple[int, ...]  # bytes of each on disk

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.sizes)


class Piece(NamedTuple):
    """What a format cuts from a unit for one chunk."""

    payload: Any  # lines, an Arrow stream, or the names of text files
    records: int  # records, or lines, in it
    content: int  # size of the payload: bytes of lines or text files, or rows
    end: int  # where in the unit it ends, in bytes on disk; at least the end of the piece before


@dataclass(frozen=True)
class Skipped:
    """Input that did not become a document. The account in meta.json counts it under `reason`."""

    where: str  # file:record
    reason: str
    detail: str = ""  # what to add to the reason, including punctuation
    size: int = 0  # in the unit of its chunk's `content`
    records: int = 1

    @property
    def why(self) -> str:
        """Reason and detail."""
        return self.reason + self.detail


@dataclass(frozen=True)
class Chunk:
    """A piece of a unit, as a worker parses it."""

    format: str
    origin: str
    first: int  # number of its first record, from 1
    payload: Any  # of its Piece
    content: int  # of its Piece
    input_bytes: int  # bytes on disk that it was cut from; those of all chunks of a unit sum to the unit's size
    problem: Skipped | None = None  # instead of a payload: why the rest of the file cannot be read


class BreaksOff(Exception):
    """The rest of a file cannot be read. Everything before the break was read; `end` is the position of the break in bytes."""

    def __init__(self, why: object, end: int, reason: str = BREAKS_OFF, records: int = 1):
        super().__init__(reason_of(why))
        self.end, self.reason = end, reason
        self.records = 0 if reason == TRAILING else records  # how many are lost, at least

    def skipped(self, where: str, size: int, records: int) -> Skipped:
        """What is lost, for the account."""
        detail = f": {self}" if self.reason == TRAILING else f" here: {self}"
        return Skipped(where, self.reason, detail, size, records)


def is_compressed(path: Path) -> bool:
    """Whether the suffix is that of a compression."""
    return path.suffix.lower() in DECOMPRESSORS


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The contents of a file, decompressed according to its suffix, in blocks, each with the position in the file where it ends.

    Raises BreaksOff, after the contents before the break, when the file is damaged or truncated, or has other bytes at its end.
    """
    with open(path, "rb") as raw:
        if is_compressed(path):
            yield from DECOMPRESSORS[path.suffix.lower()](raw)
            return
        try:
            while block := raw.read(CHUNK_BYTES):
                yield block, raw.tell()
        except OSError as problem:
            raise BreaksOff(problem, raw.tell()) from problem


def _read_gzip(raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    member, rest, member_end = None, b"", 0  # member_end: where the last complete member ends
    while rest := rest or raw.read(INPUT_BYTES):
        first, member = member is None, member or zlib.decompressobj(wbits=31)
        before = member.copy()
        try:
            contents = member.decompress(rest)
        except zlib.error as problem:
            if first and member_end and "header" in str(problem):
                raise BreaksOff(OTHER, member_end, TRAILING) from problem
            yield from _before_the_flaw(before, rest, raw.tell() - len(rest))
            raise AssertionError("the second pass did not fail") from problem
        rest = member.unused_data
        yield contents, raw.tell() - len(rest)
        if member.eof:
            member, member_end = None, raw.tell() - len(rest)
    if member:
        trailing = member_end and raw.tell() - member_end < 10  # a member begins with ten bytes
        where = (member_end, TRAILING) if trailing else (raw.tell(), BREAKS_OFF)
        raise BreaksOff(OTHER if trailing else "the file ends before its data does", *where)


def _before_the_flaw(member: Any, data: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """Decompress `data` byte by byte up to the flaw, as zlib discards all output of a call that fails. `start`: its position."""
    contents = bytearray()
    for i in range(len(data)):
        try:
            contents += member.decompress(data[i : i + 1])
        except zlib.error as problem:
            yield bytes(contents), start + i
            raise BreaksOff(problem, start + i) from problem


def _read_zstd(raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    import pyarrow as pa

    done = end = 0
    try:
        stream = pa.CompressedInputStream(_Sips(raw), "zstd")
        while contents := stream.read(CHUNK_BYTES):
            done, end = done + len(contents), max(end, raw.tell() - SIP_BYTES)  # a lower bound: pyarrow reads ahead
            yield contents, end
        return
    except OSError as problem:
        why = str(problem)
    # pyarrow discards all output of a read that fails. Read again up to the flaw, byte by byte after `end`.
    contents = bytearray()
    raw.seek(0)
    try:
        stream = pa.CompressedInputStream(_Sips(raw, end), "zstd")
        while done:
            done -= len(stream.read(min(done, CHUNK_BYTES)))
        while byte := stream.read(1):
            contents += byte
    except OSError:
        pass
    trailing = "frame descriptor" in why and bool(end or contents)
    end = raw.tell() - trailing  # the first byte that belongs to no frame was read too
    if contents:
        yield bytes(contents), end
    if "too much memory" in why:
        why = "its window is above 128 MiB; compress it again without --long: zstd -d --long=31 FILE, then zstd"
    raise BreaksOff(OTHER if trailing else why, end, TRAILING if trailing else BREAKS_OFF)


class _Sips(io.RawIOBase):
    """Returns few bytes per read, so that raw.tell() is close to what was decompressed; one byte per read after `single_from`."""

    def __init__(self, raw: BinaryIO, single_from: float = math.inf):
        self.raw, self.single_from = raw, single_from

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.raw.read(max(1, min(size, SIP_BYTES, int(min(self.single_from - self.raw.tell(), size)))))


DECOMPRESSORS = {".gz": _read_gzip, ".zst": _read_zstd}

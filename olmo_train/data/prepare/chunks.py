"""A piece of an input file that travels to a worker, and the opening of compressed files."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 2**20
SIP_BYTES = 2**12
INPUT_BYTES = 2**14  # of a compressed file, read at once
BREAKS_OFF = "the compressed stream breaks off"  # reasons
OTHER = "zero padding, or something else"
TRAILING = "bytes behind the end of the compressed data"


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


class BreaksOff(Exception):
    """Nothing more can be read from a file. All its contents before the break were read; `end` is where the break is."""

    def __init__(self, why: object, end: int, reason: str = BREAKS_OFF):
        super().__init__(" ".join(str(why).split()))
        self.end, self.reason = end, reason
        self.records = 0 if reason == TRAILING else 1  # that are lost, at least

    def chunk(self, format: str, origin: str, first: int) -> Chunk:
        """The last chunk of the file, which counts what is lost from record `first` on."""
        detail = f": {self}" if self.reason == TRAILING else f" here: {self}"
        loss = Skipped(f"{origin}:{first}", self.reason, detail, 1, self.records)
        return Chunk(format, origin, first, b"", 1, 0, loss)


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in DECOMPRESSORS


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The contents of a file, decompressed by its suffix, in blocks, each with the place in the file where it ends.

    Raises BreaksOff, after the contents before the break, when the file is damaged, cut off, or has more behind its end.
    """
    with open(path, "rb") as raw:
        if is_compressed(path):
            yield from DECOMPRESSORS[path.suffix.lower()](path, raw)
            return
        try:
            while block := raw.read(CHUNK_BYTES):
                yield block, raw.tell()
        except OSError as problem:
            raise BreaksOff(problem, raw.tell()) from problem


def _read_gzip(path: Path, raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    member, rest, member_end = None, b"", 0  # where the last whole member ends
    while rest := rest or raw.read(INPUT_BYTES):
        first, member = member is None, member or zlib.decompressobj(wbits=31)
        before = member.copy()
        try:
            contents = member.decompress(rest)
        except zlib.error as problem:
            if first and member_end and "header" in str(problem):
                raise BreaksOff(OTHER, member_end, TRAILING) from problem
            yield from _before_the_flaw(before, rest, raw.tell() - len(rest))
            raise AssertionError("the flaw was not met again") from problem
        rest = member.unused_data
        yield contents, raw.tell() - len(rest)
        if member.eof:
            member, member_end = None, raw.tell() - len(rest)
    if member:
        trailing = member_end and raw.tell() - member_end < 10  # a member begins with ten bytes
        where = (member_end, TRAILING) if trailing else (raw.tell(), BREAKS_OFF)
        raise BreaksOff(OTHER if trailing else "the file ends before its data does", *where)


def _before_the_flaw(member: Any, data: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """Decompress byte by byte what zlib discards together with the flawed byte; `start`: of `data` in the file."""
    contents = bytearray()
    for i in range(len(data)):
        try:
            contents += member.decompress(data[i : i + 1])
        except zlib.error as problem:
            yield bytes(contents), start + i
            raise BreaksOff(problem, start + i) from problem


def _read_zstd(path: Path, raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    import pyarrow as pa

    done = end = 0
    try:
        stream = pa.CompressedInputStream(_Sips(raw), "zstd")
        while contents := stream.read(CHUNK_BYTES):
            done, end = done + len(contents), max(end, raw.tell() - SIP_BYTES)  # at least: more was read than decompressed
            yield contents, end
        return
    except OSError as problem:
        why = str(problem)
    # pyarrow discards what it read together with the flaw: read again up to it, byte by byte behind `end`
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
    end = raw.tell() - trailing  # the byte that is of no frame was read
    if contents:
        yield bytes(contents), end
    if "too much memory" in why:
        why = "its window is above 128 MiB; compress it again without --long: zstd -d --long=31 FILE, then zstd"
    raise BreaksOff(OTHER if trailing else why, end, TRAILING if trailing else BREAKS_OFF)


class _Sips(io.RawIOBase):
    """Hands out few bytes at a time, so that raw.tell() is near to what was decompressed; single ones behind `single_from`."""

    def __init__(self, raw: BinaryIO, single_from: float = math.inf):
        self.raw, self.single_from = raw, single_from

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.raw.read(max(1, min(size, SIP_BYTES, int(min(self.single_from - self.raw.tell(), size)))))


DECOMPRESSORS = {".gz": _read_gzip, ".zst": _read_zstd}

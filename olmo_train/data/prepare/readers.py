"""Read input files of all formats as one ordered list of records.

The input is cut into chunks of about 1 MiB, at places that depend on the files alone. The main process cuts chunks, which is
cheap, and workers parse them. So the result is the same for any number of workers, and (unit, chunk) is all that a restart
needs to know. A format is a row of FORMATS.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

from olmo_train.data.prepare import tables
from olmo_train.data.prepare.chunks import CHUNK_BYTES, TRAILING, BreaksOff, Chunk, Skipped, is_compressed, read_blocks
from olmo_train.data.prepare.elements import json_elements
from olmo_train.data.prepare.inputs import Unit, find_units

NOT_UTF8, BINARY, NO_FILE = "is not UTF-8", "is binary, not text", "cannot be read"  # reasons
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
FIELDS = ("id", "messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output")


@dataclass(frozen=True)
class Record:
    """One document to be: its text in segments, each scored (trained on) or only read."""

    id: str | None
    origin: str
    record: int | None  # counted from 1 in its file (of JSONL: its line); None where the file is the document
    segments: tuple[tuple[str, bool], ...]
    size: int = field(default=0, compare=False)  # of its chunk's `content`


def chunks(unit: Unit, text_field: str) -> Iterator[Chunk]:
    """The chunks of a unit, in order; their input_bytes sum to the unit's size. A file that breaks off ends with a `problem`."""
    waiting, rest = None, unit.size
    for chunk in FORMATS[unit.format].cut(unit, text_field):
        if waiting:
            yield waiting
        waiting, rest = chunk, rest - chunk.input_bytes
    if waiting is None:  # a compressed file or a table without contents
        waiting = Chunk("jsonl", unit.origins[0], 1, b"", 0, 0)
    yield replace(waiting, input_bytes=waiting.input_bytes + rest)


def records(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    """The records of a chunk, in order."""
    if chunk.problem:
        yield chunk.problem
    else:
        yield from FORMATS[chunk.format].parse(chunk, text_field)


def read_texts(inputs: list[str], text_field: str, on_skip: Callable[[Skipped], None]) -> Iterator[str]:
    """All text of the inputs, in order: what a tokenizer is trained on."""
    for unit in find_units(inputs, on_skip):
        for chunk in chunks(unit, text_field):
            for record in records(chunk, text_field):
                if isinstance(record, Skipped):
                    on_skip(record)
                else:
                    yield from (text for text, _ in record.segments)


def _cut_lines(unit: Unit, text_field: str) -> Iterator[Chunk]:
    """Whole lines, about CHUNK_BYTES of them; a longer line is a chunk alone."""
    (path,), (origin,) = unit.files, unit.origins
    line, reported, end, carry, broken = 1, 0, 0, bytearray(), None
    try:
        for block, end in read_blocks(path):
            cut = block.rfind(b"\n") + 1
            if not cut or len(carry) + cut < CHUNK_BYTES // 2:  # decompressed blocks are small
                carry += block
                continue
            carry += block[:cut]
            data, carry = bytes(carry), bytearray(block[cut:])
            data_end = end if is_compressed(path) else end - len(carry)
            yield Chunk("jsonl", origin, line, data, len(data), data_end - reported)
            line, reported = line + data.count(b"\n"), data_end
    except BreaksOff as problem:
        broken, end = problem, problem.end
        whole = carry.rfind(b"\n") + 1
        if broken.reason != TRAILING and not _is_json(carry[whole:]):  # the record in which the file breaks off
            end = reported + (end - reported) * whole // max(len(carry), 1)
            del carry[whole:]
        else:
            broken.records = 0
    if carry:
        yield Chunk("jsonl", origin, line, bytes(carry), len(carry), end - reported)
    if broken:
        yield broken.chunk("jsonl", origin, line + carry.count(b"\n"))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line or b"0")
    except (ValueError, RecursionError):
        return False
    return True


def _parse_lines(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    for number, line in enumerate(BytesIO(chunk.payload), start=chunk.first):
        where, size = f"{chunk.origin}:{number}", len(line)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode())
        except UnicodeDecodeError as problem:
            yield Skipped(where, NOT_UTF8, f" (byte {problem.start} of the line)", size)
        except (ValueError, RecursionError) as problem:
            yield Skipped(where, "is not JSON", f": {problem}", size)
        else:
            yield to_record(values, chunk.origin, number, text_field, size)


def _cut_json(unit: Unit, text_field: str) -> Iterator[Chunk]:
    """The elements of an array, or objects that follow one another, each as one line."""
    (path,), (origin,) = unit.files, unit.origins
    first, reported, end, lines, size = 1, 0, 0, [], 0
    try:
        for line, end in json_elements(path):
            lines.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield _joined(origin, first, lines, end - reported)
                first, reported, lines, size = first + len(lines), end, [], 0
    except BreaksOff as problem:
        if lines:
            yield _joined(origin, first, lines, end - reported)
        yield problem.chunk("jsonl", origin, first + len(lines))
        return
    if lines:
        yield _joined(origin, first, lines, end - reported)


def _joined(origin: str, first: int, lines: list[bytes], input_bytes: int) -> Chunk:
    payload = b"\n".join(lines)
    return Chunk("jsonl", origin, first, payload, len(payload), input_bytes)


def _cut_text(unit: Unit, text_field: str) -> Iterator[Chunk]:
    yield Chunk("text", unit.origins[0], 1, (unit.files, unit.origins, unit.sizes), unit.size, unit.size)


def _parse_text(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    for path, origin, size in zip(*chunk.payload, strict=True):
        data, broken = bytearray(), None
        try:
            for block, _ in read_blocks(path):
                data += block
        except BreaksOff as problem:  # the text before the break is kept
            broken = problem
        except OSError as problem:
            yield Skipped(origin, NO_FILE, f": {problem.strerror}", size)
            continue
        if broken and not data:
            yield replace(broken.chunk("text", origin, 1).problem, where=origin, size=size, records=1)
            continue
        lost = size - broken.end if broken else 0
        yield _text(data, origin, size - lost, whole=not broken)
        if broken:
            yield replace(broken.chunk("text", origin, 1).problem, where=origin, size=lost, records=0)


def _text(data: bytes, origin: str, size: int, whole: bool) -> Record | Skipped:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError as problem:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return Skipped(origin, NOT_UTF8, " but UTF-16; convert it: iconv -f UTF-16 -t UTF-8", size)
        if b"\0" in data[:8192]:
            return Skipped(origin, BINARY, size=size)
        return Skipped(origin, NOT_UTF8, f" (byte {problem.start})", size)
    if "\0" in text[:8192]:
        return Skipped(origin, BINARY, size=size)
    return Record(None, origin, None, ((text, True),), size)


def _cut_table(unit: Unit, text_field: str) -> Iterator[Chunk]:
    return tables.cut(unit.format, unit.files[0], unit.origins[0], unit.size, (text_field, *FIELDS))


def _parse_table(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    for number, values in enumerate(tables.rows(chunk), start=chunk.first):
        if isinstance(values, Exception):
            yield Skipped(f"{chunk.origin}:{number}", "cannot be read", f": {values}", 1)
        else:
            yield to_record(values, chunk.origin, number, text_field)


def to_record(values: Any, origin: str, number: int, text_field: str, size: int = 1) -> Record | Skipped:
    """A record's fields as a document: its text, an instruction and its answer, or chat messages."""

    def skipped(reason: str, detail: str = "") -> Skipped:
        return Skipped(f"{origin}:{number}", reason, detail, size)

    if not isinstance(values, dict):
        return skipped("is no record with fields", f", but {type(values).__name__}")
    segments = _segments(values, text_field)
    if segments is None:
        known = ", ".join(map(str, list(values)[:8]))
        return skipped(f"has no text in a field '{text_field}'", f"; its fields: {known}; see --text-field")
    id = values.get("id")
    try:
        segments = [(text.decode() if isinstance(text, bytes) else text, scored) for text, scored in segments]
        id = id.decode() if isinstance(id, bytes) else id if id is None else str(id)
    except UnicodeDecodeError as problem:
        return skipped(NOT_UTF8, f" (byte {problem.start})")
    for text, _ in segments:
        if not isinstance(text, str):
            return skipped(f"holds {type(text).__name__} where text is expected")
    if not all(map(_encodable, (id or "", *(text for text, _ in segments)))):
        return skipped("holds a lone surrogate, which no UTF-8 text has")
    return Record(id, origin, number, tuple(segments), size)


def _segments(values: dict, text_field: str) -> list[tuple[Any, bool]] | None:
    """(what is text in a good record, whether it is scored); None when no field is known."""
    answer = next((values[key] for key in ("response", "completion") if values.get(key) is not None), None)
    if values.get(text_field) is not None:
        return [(values[text_field], True)]
    for key in ("messages", "conversations"):
        if isinstance(values.get(key), list):
            return _chat(values[key])
    if values.get("prompt") is not None and answer is not None:
        return [(values["prompt"], False), (answer, True)]
    if values.get("instruction") is not None and values.get("output") is not None:  # Alpaca's
        asked = [values["instruction"], "\n\n", *([values["input"], "\n\n"] if values.get("input") else [])]
        return [*((text, False) for text in asked), (values["output"], True)]
    return None


def _chat(messages: list) -> list[tuple[Any, bool]]:
    """`<|role|>\\ncontent\\n` a message, as OLMo's instruction models have it; what the assistant says is scored."""
    segments = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        role = ROLES.get(role, role) if isinstance(role, str) else role
        scored = role == "assistant"
        segments += [(f"<|{role}|>\n", False), *((text, scored) for text in _content(content)), ("\n", False)]
    return segments[:-1]  # EOS follows the last message


def _content(content: Any) -> list:
    """The texts of a message: its content, or the parts of it; a part that is no text stays what it is."""
    if not isinstance(content, list):
        return [content]
    return [part.get("text") if isinstance(part, dict) and "text" in part else part for part in content]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class _Format:
    cut: Callable[[Unit, str], Iterator[Chunk]]  # in the main process
    parse: Callable[[Chunk, str], Iterator[Record | Skipped]]  # in a worker


FORMATS = {
    "jsonl": _Format(_cut_lines, _parse_lines),
    "json": _Format(_cut_json, _parse_lines),
    "parquet": _Format(_cut_table, _parse_table),
    "arrow": _Format(_cut_table, _parse_table),
    "text": _Format(_cut_text, _parse_text),
}

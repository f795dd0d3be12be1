"""Read input files of all formats as one ordered list of records.

The input is cut into chunks of about 1 MiB, at places that depend on the files alone. The main process cuts, which is cheap, and
workers parse. So the result is the same for any number of workers, and a restart needs only (unit, chunk). A format is a row of
FORMATS.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

from olmo_train.data.prepare import tables
from olmo_train.data.prepare.chunks import (
    CHUNK_BYTES,
    TRAILING,
    BreaksOff,
    Chunk,
    Piece,
    Skipped,
    Unit,
    is_compressed,
    read_blocks,
)
from olmo_train.data.prepare.elements import json_elements

NOT_UTF8, BINARY, NO_FILE = "is not UTF-8", "is binary, not text", "cannot be read"  # reasons
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
FIELDS = ("id", "messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output")


@dataclass(frozen=True)
class Record:
    """A document before tokenization: segments of text, each scored (trained on) or only read."""

    id: str | None
    origin: str
    record: int | None  # counted from 1 in its file (in JSONL: its line); None if the file is the document
    segments: tuple[tuple[str, bool], ...]
    size: int = field(default=0, compare=False)  # in the unit of its chunk's `content`
    turns: tuple[tuple[str, str], ...] = ()  # the same as messages, (role, text), for a template; none for plain text

    @property
    def place(self) -> str:
        """file, or file:record; the id of a record without one."""
        return self.origin if self.record is None else f"{self.origin}:{self.record}"


class Tail(NamedTuple):
    """The end of one document, which becomes a document to be held out."""

    place: str  # of the record
    share: float  # of its characters, up to the next line break


def cut(found: Iterable[Record | Skipped], tail: Tail | None) -> Iterator[Record | Skipped]:
    """The same records, but the one with a tail as two: its beginning, and its end. A conversation is not cut."""
    for record in found:
        if not tail or isinstance(record, Skipped) or record.place != tail.place or len(record.segments) > 1:
            yield record
            continue
        ((text, scored),) = record.segments
        at = int(len(text) * (1 - tail.share))
        after = text.find("\n", at) + 1
        at = after if 0 < after < len(text) else text.rfind("\n", 0, at) + 1 or text.rfind(" ", 0, at) + 1 or at
        yield replace(record, segments=((text[:at], scored),))
        yield replace(record, segments=((text[at:], scored),), size=0)


def chunks(unit: Unit, text_field: str) -> Iterator[Chunk]:
    """The chunks of a unit, in order; their input_bytes sum to the unit's size. A file that breaks off ends with a `problem`."""
    origin, first, start = unit.origins[0], 1, 0
    last = None  # not yielded yet, as the last chunk counts the bytes up to the end of the file
    try:
        for piece in FORMATS[unit.format].cut(unit, text_field):
            if last:
                yield last
            end = min(max(piece.end, start), unit.size)
            last = Chunk(unit.format, origin, first, piece.payload, piece.content, end - start)
            first, start = first + piece.records, end
    except BreaksOff as broken:
        if last:
            yield last
        last = Chunk(unit.format, origin, first, b"", 1, 0, broken.skipped(f"{origin}:{first}", 1, broken.records))
    if last is None:  # a compressed file or a table without contents
        last = Chunk("jsonl", origin, 1, b"", 0, 0)
    yield replace(last, input_bytes=last.input_bytes + unit.size - start)


def records(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    """The records of a chunk, in order."""
    if chunk.problem:
        yield chunk.problem
    else:
        yield from FORMATS[chunk.format].parse(chunk, text_field)


def _cut_lines(unit: Unit, text_field: str) -> Iterator[Piece]:
    """Complete lines, about CHUNK_BYTES of them; a longer line is a piece alone."""
    (path,) = unit.files
    carry, start, end = bytearray(), 0, 0
    try:
        for block, end in read_blocks(path):
            cut = block.rfind(b"\n") + 1
            if not cut or len(carry) + cut < CHUNK_BYTES // 2:  # decompressed blocks are small
                carry += block
                continue
            carry += block[:cut]
            start = end if is_compressed(path) else end - len(block) + cut
            yield _lines(carry, start)
            carry = bytearray(block[cut:])
    except BreaksOff as broken:
        whole, end = carry.rfind(b"\n") + 1, broken.end
        if broken.reason == TRAILING or _is_json(carry[whole:]):
            broken.records = 0
        else:  # the record in which the file breaks off
            end = start + (end - start) * whole // max(len(carry), 1)
            del carry[whole:]
        if carry:
            yield _lines(carry, end)
        raise
    if carry:
        yield _lines(carry, end)


def _lines(payload: bytes | bytearray, end: int) -> Piece:
    return Piece(bytes(payload), payload.count(b"\n"), len(payload), end)


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


def _cut_json(unit: Unit, text_field: str) -> Iterator[Piece]:
    """The elements of an array, or objects that follow one another, each as one line."""
    lines, size, end = [], 0, 0
    try:
        for line, end in json_elements(unit.files[0]):
            lines.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield _elements(lines, end)
                lines, size = [], 0
    except BreaksOff:
        if lines:
            yield _elements(lines, end)
        raise
    if lines:
        yield _elements(lines, end)


def _elements(lines: list[bytes], end: int) -> Piece:
    payload = b"\n".join(lines)
    return Piece(payload, len(lines), len(payload), end)


def _cut_text(unit: Unit, text_field: str) -> Iterator[Piece]:
    yield Piece((unit.files, unit.origins, unit.sizes), len(unit.files), unit.size, unit.size)


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
            yield broken.skipped(origin, size, 1)
            continue
        lost = size - broken.end if broken else 0
        yield _text(data, origin, size - lost, complete=not broken)
        if broken:
            yield broken.skipped(origin, lost, 0)


def _text(data: bytes, origin: str, size: int, complete: bool) -> Record | Skipped:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=complete)
    except UnicodeDecodeError as problem:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return Skipped(origin, NOT_UTF8, " but UTF-16; convert it: iconv -f UTF-16 -t UTF-8", size)
        if b"\0" in data[:8192]:
            return Skipped(origin, BINARY, size=size)
        return Skipped(origin, NOT_UTF8, f" (byte {problem.start})", size)
    if "\0" in text[:8192]:
        return Skipped(origin, BINARY, size=size)
    return Record(None, origin, None, ((text, True),), size)


def _cut_table(open_table: Callable, unit: Unit, text_field: str) -> Iterator[Piece]:
    return tables.cut(open_table, unit.files[0], (text_field, *FIELDS))


def _parse_table(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    for number, values in enumerate(tables.rows(chunk.payload), start=chunk.first):
        if isinstance(values, Exception):
            yield Skipped(f"{chunk.origin}:{number}", NO_FILE, f": {values}", 1)
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
        texts = [str(name) for name, value in values.items() if isinstance(value, str) and name not in (text_field, "id")]
        fix = f"; its fields: {known}; to read another one, set --text-field {texts[0] if texts else 'NAME'}"
        return skipped(f"has no text in a field '{text_field}'", fix)
    id = values.get("id")
    try:
        segments = [(_decoded(text), scored) for text, scored in segments]
        id = id.decode() if isinstance(id, bytes) else id if id is None else str(id)
        for text, _ in segments:
            if not isinstance(text, str):
                return skipped(f"holds {type(text).__name__} where text is expected")
        "".join([id or "", *(text for text, _ in segments)]).encode()
    except UnicodeDecodeError as problem:
        return skipped(NOT_UTF8, f" (byte {problem.start})")
    except UnicodeEncodeError:
        return skipped("holds a lone surrogate, which no UTF-8 text has")
    return Record(id, origin, number, tuple(segments), size, _turns(values))


def _decoded(text: Any) -> Any:
    return text.decode() if isinstance(text, bytes) else text


def _segments(values: dict, text_field: str) -> list[tuple[Any, bool]] | None:
    """(what must be text, whether it is scored); None when the record has no known field."""
    answer = _answer(values)
    if values.get(text_field) is not None:
        return [(values[text_field], True)]
    for key in ("messages", "conversations"):
        if isinstance(values.get(key), list):
            return chat_segments(map(message_of, values[key]))
    if values.get("prompt") is not None and answer is not None:
        return [(values["prompt"], False), (answer, True)]
    if values.get("instruction") is not None and values.get("output") is not None:  # Alpaca's
        asked = [values["instruction"], "\n\n", *([values["input"], "\n\n"] if values.get("input") else [])]
        return [*((text, False) for text in asked), (values["output"], True)]
    return None


def _answer(values: dict) -> Any:
    """The response of a record with a prompt; None without one."""
    return next((values[key] for key in ("response", "completion") if values.get(key) is not None), None)


def _turns(values: dict) -> tuple[tuple[str, str], ...]:
    """(role, text) of the messages of a record; none for plain text, or where one of them is not text."""
    try:
        turns = tuple((str(role), _decoded(text)) for role, text in _messages(values))
        "".join(word for turn in turns for word in turn).encode()
    except (TypeError, UnicodeError):
        return ()
    return turns


def _messages(values: dict) -> list[tuple[Any, Any]]:
    """(role, what must be text) of the messages of a record, or of an instruction and its answer."""
    answer = _answer(values)
    for key in ("messages", "conversations"):
        if isinstance(values.get(key), list):
            return [(role, _joined(content)) for role, content in map(message_of, values[key])]
    if values.get("prompt") is not None and answer is not None:
        return [("user", values["prompt"]), ("assistant", answer)]
    if values.get("instruction") is not None and values.get("output") is not None:
        asked = [values["instruction"], *(["\n\n", values["input"]] if values.get("input") else [])]
        return [("user", _joined(asked)), ("assistant", values["output"])]
    return []


def _joined(content: Any) -> str:
    """The text of a message in parts. Raises TypeError for a part that is not text."""
    return "".join(map(_decoded, _content(content)))


def message_of(message: Any) -> tuple[Any, Any]:
    """(role, content) of a message, which may be in ShareGPT's names."""
    message = message if isinstance(message, dict) else {}
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    return ROLES.get(role, role) if isinstance(role, str) else role, content


def chat_segments(messages: Iterable[tuple[Any, Any]]) -> list[tuple[Any, bool]]:
    """`<|role|>\\ncontent\\n` for each (role, content), as in OLMo's instruction models; the assistant's messages are scored."""
    segments = []
    for role, content in messages:
        scored = role == "assistant"
        segments += [(f"<|{role}|>\n", False), *((text, scored) for text in _content(content)), ("\n", False)]
    return segments[:-1]  # EOS follows the last message


def _content(content: Any) -> list:
    """The texts of a message: its content, or its parts. A part that is not text is returned unchanged."""
    if not isinstance(content, list):
        return [content]
    return [part.get("text") if isinstance(part, dict) and "text" in part else part for part in content]


@dataclass(frozen=True)
class Format:
    """How files of a format are recognized and read; both functions get the name of the text field."""

    suffixes: tuple[str, ...]  # in lower case, before .gz or .zst
    cut: Callable[[Unit, str], Iterator[Piece]]  # in the main process
    parse: Callable[[Chunk, str], Iterator[Record | Skipped]]  # in a worker


FORMATS = {
    "jsonl": Format((".jsonl", ".jsonlines", ".jl", ".ndjson"), _cut_lines, _parse_lines),
    "json": Format((".json",), _cut_json, _parse_lines),
    "parquet": Format((".parquet",), partial(_cut_table, tables.open_parquet), _parse_table),
    "arrow": Format((".arrow", ".feather"), partial(_cut_table, tables.open_arrow), _parse_table),
    "text": Format((), _cut_text, _parse_text),  # every other file, unless it begins with JSON lines
}

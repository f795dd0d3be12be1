"""Text in its many files, as one ordered list of records.

The one idea: reading is cut into chunks of about a mebibyte, and where they are cut depends on the files alone. A chunk
is cheap to make (the main process does it) and can be parsed anywhere (a worker does it), so the result is the same for
any number of workers, and (unit, chunk) is all that a restart needs to know. A format is a row of FORMATS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from olmo_train.data import tables
from olmo_train.data.chunks import CHUNK_BYTES, Chunk, Skipped, broken, open_stream
from olmo_train.errors import ConfigError

SUFFIXES = {  # suffix, after .gz or .zst was taken off -> format
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSED = (".gz", ".zst")
NOT_UTF8, BINARY = "is not UTF-8", "is binary, not text"  # reasons
HUB_FILES = {"dataset_info.json", "state.json", "dataset_dict.json"}  # what `datasets` writes beside a data set's files


@dataclass(frozen=True)
class Record:
    """One document to be: its text in segments, each scored (trained on) or only read."""

    id: str | None
    origin: str
    record: int | None  # counted from 1 in its file (of JSONL: its line); None where the file is the document
    segments: tuple[tuple[str, bool], ...]
    size: int = field(default=0, compare=False)  # of its chunk's `content`


@dataclass(frozen=True)
class Unit:
    """What is read in one go: one file of records, or several text files that fill a chunk."""

    format: str
    files: tuple[Path, ...]
    origins: tuple[str, ...]  # the files as the user would name them
    sizes: tuple[int, ...]  # bytes of each on disk

    @property
    def size(self) -> int:
        return sum(self.sizes)


def find_units(inputs: list[str], on_note: Callable[[str], None] = lambda note: None) -> list[Unit]:
    """Every file that `inputs` name, in the order given; those of a folder by their relative path.

    `on_note` is told of files in a folder that are not read.
    Raises ConfigError for an input that does not exist, holds nothing, or is a data set of which a split must be named.
    """
    found: list[tuple[str, Path, str]] = []
    for word in inputs:
        path = Path(word)
        if path.is_dir():
            found += _walk(path, on_note)
        elif path.is_file():
            found.append((_format(path), path, str(path)))
        else:
            raise ConfigError(word, "does not exist; name a file or a folder of text, JSONL, Parquet or Arrow")
    units: list[Unit] = []
    for format, path, origin in found:
        size, last = path.stat().st_size, units[-1] if units else None
        if last and format == last.format == "text" and last.size + size <= CHUNK_BYTES:
            units[-1] = Unit("text", (*last.files, path), (*last.origins, origin), (*last.sizes, size))
        else:
            units.append(Unit(format, (path,), (origin,), (size,)))
    return units


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
    for unit in find_units(inputs):
        for chunk in chunks(unit, text_field):
            for record in records(chunk, text_field):
                if isinstance(record, Skipped):
                    on_skip(record)
                else:
                    yield from (text for text, _ in record.segments)


def _format(path: Path) -> str:
    inner = Path(path.stem) if path.suffix in COMPRESSED else path
    return SUFFIXES.get(inner.suffix.lower(), "text")


def _walk(folder: Path, on_note: Callable[[str], None]) -> list[tuple[str, Path, str]]:
    """(format, file, origin) of a folder: its files of records when they are at least half of all, else the others as text."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "dataset_dict.json" in names:
            raise ConfigError(parent, f"is a data set of several splits; name one: {', '.join(f'{parent}/{s}' for s in folders)}")
        files += [Path(parent, name) for name in names if not name.startswith(".") and name not in HUB_FILES]
    files = sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(folder).parts)
    if not files:
        raise ConfigError(folder, "holds no files")
    if all(file.suffix == ".json" for file in files):
        of_records, others = files, []
    else:  # a lone .json among other files is more often settings than records
        of_records = [file for file in files if _format(file) != "text" and file.suffix != ".json"]
        others = [file for file in files if _format(file) == "text" or file.suffix == ".json"]
    as_records = 2 * len(of_records) >= len(files)
    kept, passed = (of_records, others) if as_records else (others, of_records)
    if passed:
        kinds = ("files of records", "other files") if as_records else ("text files", "files of records")
        on_note(f"{folder}: its {len(kept)} {kinds[0]} are read, its {len(passed)} {kinds[1]} are not (such as {passed[0]})")
    if as_records:
        _refuse_splits(folder, kept)
    return [(_format(file) if as_records else "text", file, str(file)) for file in kept]


def _refuse_splits(folder: Path, files: list[Path]) -> None:
    """Hub folders hold train-00000-of-00002.parquet beside test-...: training on both must be the user's own wish."""
    splits = {
        file.name.split("-")[0]
        for file in files
        if file.name.split("-")[0] in ("train", "validation", "test") and "-of-" in file.name
    }
    if len(splits) > 1:
        raise ConfigError(
            folder, f"holds the splits {', '.join(sorted(splits))}; name the files of one, such as {folder}/.../train-*"
        )


def _cut_lines(unit: Unit, text_field: str) -> Iterator[Chunk]:
    """Whole lines, about CHUNK_BYTES of them; a longer line is a chunk of its own."""
    (path,), (origin,) = unit.files, unit.origins
    line, carry, told = 1, bytearray(), 0
    with open(path, "rb") as raw:
        try:
            stream = open_stream(path, raw)
            while block := stream.read(CHUNK_BYTES):
                cut = block.rfind(b"\n") + 1
                if not cut:
                    carry += block
                    continue
                carry += block[:cut]
                data, carry = bytes(carry), bytearray(block[cut:])
                end = raw.tell() - (len(carry) if stream is raw else 0)
                yield Chunk("jsonl", origin, line, data, len(data), end - told)
                line, told = line + data.count(b"\n"), end
        except (OSError, EOFError) as problem:  # a damaged or cut-off compressed file
            yield broken("jsonl", origin, line, problem)
            return
    if carry:
        yield Chunk("jsonl", origin, line, bytes(carry), len(carry), unit.size - told)


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


def _cut_text(unit: Unit, text_field: str) -> Iterator[Chunk]:
    yield Chunk("text", unit.origins[0], 1, (unit.files, unit.origins, unit.sizes), unit.size, unit.size)


def _parse_text(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    for path, origin, size in zip(*chunk.payload, strict=True):
        try:
            with open(path, "rb") as raw:
                data = open_stream(path, raw).read()
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            if b"\0" in data[:8192]:
                yield Skipped(origin, BINARY, size=size)
            else:
                yield Skipped(origin, NOT_UTF8, f" (byte {problem.start})", size)
        except (OSError, EOFError) as problem:
            yield Skipped(origin, "cannot be read", f": {problem}", size)
        else:
            if "\0" in text[:8192]:
                yield Skipped(origin, BINARY, size=size)
            else:
                yield Record(None, origin, None, ((text, True),), size)


def _cut_table(unit: Unit, text_field: str) -> Iterator[Chunk]:
    return tables.cut(unit.format, unit.files[0], unit.origins[0], unit.size, (text_field, *FIELDS))


def _parse_table(chunk: Chunk, text_field: str) -> Iterator[Record | Skipped]:
    for number, values in enumerate(tables.rows(chunk), start=chunk.first):
        yield to_record(values, chunk.origin, number, text_field)


FIELDS = ("id", "messages", "prompt", "response", "completion")


def to_record(values: Any, origin: str, number: int, text_field: str, size: int = 1) -> Record | Skipped:
    """A record's fields as a document: its text, or an instruction's prompt/response or chat messages."""

    def skipped(reason: str, detail: str = "") -> Skipped:
        return Skipped(f"{origin}:{number}", reason, detail, size)

    if not isinstance(values, dict):
        return skipped("is no record with fields", f", but {type(values).__name__}")
    answer = next((values[key] for key in ("response", "completion") if values.get(key) is not None), None)
    if values.get(text_field) is not None:
        segments = [(values[text_field], True)]
    elif isinstance(values.get("messages"), list):
        segments = _chat(values["messages"])
    elif values.get("prompt") is not None and answer is not None:
        segments = [(values["prompt"], False), (answer, True)]
    else:
        known = ", ".join(map(str, list(values)[:8]))
        return skipped(f"has no text in a field '{text_field}'", f"; its fields: {known}; see --text-field")
    for text, _ in segments:
        if not isinstance(text, str):
            return skipped(f"holds {type(text).__name__} where text is expected")
        if not _encodable(text):
            return skipped("holds a lone surrogate, which no UTF-8 text has")
    id = values.get("id")
    return Record(None if id is None else str(id), origin, number, tuple(segments), size)


def _chat(messages: list) -> list[tuple[Any, bool]]:
    """`<|role|>\\ncontent\\n` a message, as OLMo's instruction models have it; what the assistant says is scored."""
    segments = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        scored = role == "assistant"
        segments += [(f"<|{role}|>\n", False), (content, scored), ("\n", False)]
    return segments[:-1]  # EOS follows the last message


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
    "parquet": _Format(_cut_table, _parse_table),
    "arrow": _Format(_cut_table, _parse_table),
    "text": _Format(_cut_text, _parse_text),
}

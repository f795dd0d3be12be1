"""Find the files that the inputs name, and the format of each.

No file is ignored silently. A file or folder that cannot be read is an error; one that is not data is reported as a
Skipped, with its bytes, so that the account of prepare-data covers the whole input.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from olmo_train.data.documents import DOCUMENTS_FILE
from olmo_train.data.meta import META_FILE
from olmo_train.data.prepare.chunks import CHUNK_BYTES, DECOMPRESSORS, BreaksOff, Skipped, Unit, is_compressed, read_blocks
from olmo_train.data.prepare.readers import FORMATS, chunks, records
from olmo_train.errors import ConfigError, DataError
from olmo_train.formats import counted

SUFFIXES = {suffix: name for name, format in FORMATS.items() for suffix in format.suffixes} | {".csv": "csv", ".tsv": "csv"}
HUB_FILES = {"dataset_info.json", "state.json", "dataset_dict.json"}  # what `datasets` writes beside a data set's files
WORK_FOLDER = ".unfinished"  # of prepare-data, in its output
HEAD_BYTES = 2**16  # of a file, read to distinguish JSON from text
TRAIN_WORDS = {"train", "training"}
HELD_OUT_WORDS = {"valid", "validation", "val", "dev", "test", "testing", "eval", "evaluation"}
WORD = re.compile(r"[^\W\d_]+")
NOT_IN_A_NAME = re.compile(rf"\d+-of-\d+|({'|'.join(map(re.escape, (*SUFFIXES, *DECOMPRESSORS, '.txt', '.md')))})+$", re.I)
READABLE = "make it readable, or take it out of the input"
_copies = []  # of pipes, kept open until this process ends
OnLeftOut = Callable[[Skipped], None]


def read_texts(inputs: list[str], text_field: str, on_skip: OnLeftOut, on_left_out: OnLeftOut) -> Iterator[str]:
    """All text of the inputs, in order, as a tokenizer is trained on it. `on_skip` is called for each record that is not read,
    `on_left_out` as in find_units."""
    for unit in find_units(inputs, on_left_out):
        for chunk in chunks(unit, text_field):
            for record in records(chunk, text_field):
                if isinstance(record, Skipped):
                    on_skip(record)
                else:
                    yield from (text for text, _ in record.segments)


def find_units(inputs: list[str], on_left_out: OnLeftOut = lambda skipped: None) -> list[Unit]:
    """Every file that `inputs` name, in the order of the inputs; files of a folder by their relative path.

    `on_left_out` is called for everything in a folder that is not read; its `size` is in bytes.
    Raises ConfigError for an input that does not exist, is empty, or is a data set of several splits, and DataError for files
    that cannot be read.
    """
    found: list[tuple[str, Path, str]] = []
    for word in inputs:
        path, mode = Path(word), _stat(word).st_mode
        if stat.S_ISDIR(mode):
            found += _of_folder(path, on_left_out)
        elif stat.S_ISFIFO(mode):
            copy = _copy_of_pipe(word)
            found.append((_format(copy), copy, word))
        elif stat.S_ISREG(mode):
            found.append((_format(path), path, word))
        else:
            raise ConfigError(word, f"is {_kind(mode)}; name a file, a folder or a pipe")
    units: list[Unit] = []
    for format, path, word in found:
        if format == "csv":
            raise ConfigError(word, "is a table of separated values, which is not read; convert it to Parquet or JSON lines")
        origin = os.fsencode(word).decode("utf-8", "backslashreplace").replace("\n", "\\n")  # a name may hold any bytes
        size, last = path.stat().st_size, units[-1] if units else None
        if last and format == last.format == "text" and last.size + size <= CHUNK_BYTES:
            units[-1] = Unit("text", (*last.files, path), (*last.origins, origin), (*last.sizes, size))
        else:
            units.append(Unit(format, (path,), (origin,), (size,)))
    return units


def _stat(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as problem:
        if os.path.islink(path):
            raise DataError(path, f"is a broken link to {os.readlink(path)}; repair or remove it") from problem
        raise ConfigError(path, "does not exist; name a file or a folder of text, JSON lines, Parquet or Arrow") from problem
    except OSError as problem:
        raise DataError(path, f"cannot be read: {problem.strerror}; {READABLE}") from problem


def _kind(mode: int) -> str:
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _copy_of_pipe(word: str) -> Path:
    """A temporary copy, since an input is read more than once."""
    copy = tempfile.NamedTemporaryFile(prefix="olmo_train-")  # noqa: SIM115
    _copies.append(copy)
    with open(word, "rb") as pipe:
        shutil.copyfileobj(pipe, copy)
    copy.flush()
    return Path(copy.name)


def _format(path: Path) -> str:
    """The format of a file by its suffix; JSON lines under another suffix by their contents. Raises DataError for UTF-16."""
    format = SUFFIXES.get(_suffix(path), "text")
    try:
        head = _head(path, format)
    except OSError as problem:
        raise DataError(path, f"cannot be read: {problem.strerror}; {READABLE}") from problem
    encoding = json.detect_encoding(head[:4])
    begins = head[:64].decode(encoding, "ignore").lstrip("\ufeff \t\r\n")[:1]
    if format in ("json", "jsonl") and not encoding.startswith("utf-8") and begins in ("{", "["):
        encoding = encoding.upper()
        raise DataError(path, f"is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 {path}")
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if format == "json":  # lines, or an array or object over several lines; a single line is read alike either way
        return "jsonl" if _are_lines(head, least=2) else "json"
    return "jsonl" if format == "text" and head[:1] == b"{" and _are_lines(head, least=1) else format


def _suffix(path: Path) -> str:
    """In lower case, without that of a compression."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def _head(path: Path, format: str) -> bytes:
    if format not in ("text", "json", "jsonl") or not is_compressed(path):
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    try:
        return next(read_blocks(path), (b"", 0))[0][:HEAD_BYTES]
    except BreaksOff:
        return b""


def _are_lines(head: bytes, least: int) -> bool:
    """Whether a text begins as JSON lines: at least half of its first lines are objects, or the first is a very long one."""
    *lines, last = head.split(b"\n")
    if not lines and len(head) > HEAD_BYTES // 2:
        return re.match(rb'\{\s*"', head) is not None
    lines = [line for line in (*lines, *([last] if len(head) < HEAD_BYTES // 2 else [])) if line.strip()][:8]
    return 2 * sum(map(_is_object, lines)) >= max(len(lines), 2 * least)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_folder(folder: Path, on_left_out: OnLeftOut) -> list[tuple[str, Path, str]]:
    """(format, file, origin) of a folder: its files of records if they are at least half of all, else the others as text."""
    files = [(_format(file), file) for file in _walk(folder, on_left_out)]
    if all(_suffix(file) == ".json" for _, file in files):
        records, texts = files, []
    else:  # among other files, a .json that is not JSON lines holds settings more often than records
        records = [(format, file) for format, file in files if format not in ("text", "json", "csv")]
        texts = [("text", file) for format, file in files if format in ("text", "json")]
    as_records = len(records) >= len(texts)
    kept = (records if as_records else texts) or files  # the last: csv alone
    kept_files = {file for _, file in kept}
    if passed := [file for _, file in files if file not in kept_files]:
        kinds = ("files of records", "other kinds") if as_records else ("text files", "records or tables")
        detail = (
            f": {counted(len(passed), 'file')} of {kinds[1]}, such as {passed[0]}; only {kinds[0]} are read, {len(kept):,} here"
        )
        _report(on_left_out, folder, "files of another kind than most in their folder", passed, detail)
    _refuse_splits(folder, [file for _, file in kept], as_records)
    return [(format, file, str(file)) for format, file in kept]


def _report(on_left_out: OnLeftOut, folder: Path, reason: str, files: list[Path], detail: str = "") -> None:
    if files:
        on_left_out(Skipped(str(folder), reason, detail, sum(os.lstat(file).st_size for file in files), len(files)))


def _walk(folder: Path, on_left_out: OnLeftOut) -> list[Path]:
    """The files of a folder and its subfolders, including linked ones, by their relative path."""

    def unreadable(problem: OSError) -> None:
        raise DataError(problem.filename, f"cannot be read: {problem.strerror}; {READABLE}") from problem

    files, hidden, described = [], [], []
    seen = {_identity(folder)}
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        inside, folders[:] = sorted(folders), []  # folders: those that os.walk visits next
        if WORK_FOLDER in inside or {META_FILE, DOCUMENTS_FILE} <= set(names):  # an output of prepare-data, finished or not
            if Path(parent) == folder:
                raise ConfigError(folder, "is a folder that prepare-data wrote; name the text it was prepared from")
            on_left_out(Skipped(parent, "is a folder that prepare-data wrote", "; it is not read", records=0))
            continue
        if "dataset_dict.json" in names:
            splits = ", ".join(f"{parent}/{name}" for name in inside if not name.startswith("."))
            raise ConfigError(parent, f"is a data set of several splits; name one: {splits}")
        hidden += [Path(parent, name) for name in (*inside, *names) if name.startswith(".")]
        for name in inside:
            if name.startswith("."):
                continue
            identity = _identity(Path(parent, name))
            if identity in seen:
                on_left_out(Skipped(f"{parent}/{name}", "is a link to a folder that is read", "; it is read once", records=0))
            else:
                seen.add(identity)
                folders.append(name)
        described += [Path(parent, name) for name in names if name in HUB_FILES]
        for file in (Path(parent, name) for name in names if name not in HUB_FILES and not name.startswith(".")):
            mode = _stat(file).st_mode
            if stat.S_ISREG(mode):
                files.append(file)
            else:
                on_left_out(Skipped(str(file), "is no file", f" but {_kind(mode)}; name it alone to read it"))
    inside_hidden = [file for path in hidden if path.is_dir() and not path.is_symlink() for file in path.rglob("*")]
    hidden = [file for file in (*hidden, *inside_hidden) if file.is_symlink() or not file.is_dir()]
    _report(on_left_out, folder, "a name that begins with a dot", hidden)
    _report(on_left_out, folder, "a description of a data set", described)
    if not files:
        raise ConfigError(folder, "holds no files; name a folder of texts, JSON lines, Parquet or Arrow")
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _identity(folder: Path) -> tuple[int, int]:
    status = _stat(folder)
    return status.st_dev, status.st_ino


def _refuse_splits(folder: Path, files: list[Path], as_records: bool) -> None:
    """Raise ConfigError for a folder that has training and held-out data, which would be trained on by accident.

    A file's split is the first word of its relative path that names one: c4-train.00000-of-01024.json.gz, test/0.parquet,
    val.jsonl. In a folder of texts such words may be topics (train-travel.md) or programs (train.py): there, at least half
    of the files must name a split, and two must differ by it alone (wiki.train.tokens and wiki.test.tokens).
    """
    splits: dict[str, tuple[str, set[str]]] = {}  # word: how to name its files on the command line, their other words
    n = 0
    for file in files:
        path = str(file.relative_to(folder))
        found = next((word for word in WORD.finditer(path) if word[0].lower() in TRAIN_WORDS | HELD_OUT_WORDS), None)
        if found:
            n += 1
            before, after = path[: found.start()], path[found.end() :]
            example = path[: found.end()] + (after.partition("/")[0] if "/" in after else "*")
            others = WORD.findall(NOT_IN_A_NAME.sub("", f"{before} {after}").lower())
            splits.setdefault(found[0].lower(), (f"{folder / example}", set()))[1].add(" ".join(others))
    train, held_out = ([splits[word] for word in sorted(splits) if word in words] for words in (TRAIN_WORDS, HELD_OUT_WORDS))
    if not as_records:
        alike = any(names & others for _, names in train for _, others in held_out)
        if not alike or 2 * n < len(files):
            return
    if train and held_out:
        names = ", ".join(sorted(splits))
        raise ConfigError(folder, f"holds the splits {names}; name the files of one, such as {train[0][0]}")

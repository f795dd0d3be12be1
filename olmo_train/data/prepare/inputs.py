"""Which files the inputs name, and as what each is read.

Nothing is passed over in silence: a file or folder that cannot be read is an error, and one that is not meant to be
read is reported as a Skipped, with its bytes, so that the account of prepare-data covers the whole input.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from olmo_train.data.documents import DOCUMENTS_FILE
from olmo_train.data.meta import META_FILE
from olmo_train.data.prepare.chunks import CHUNK_BYTES, BreaksOff, Skipped, is_compressed, read_blocks
from olmo_train.errors import ConfigError, DataError

SUFFIXES = {  # suffix, after .gz or .zst was taken off -> format; other files are text, or JSON lines by their contents
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
HUB_FILES = {"dataset_info.json", "state.json", "dataset_dict.json"}  # what `datasets` writes beside a data set's files
WORK_FOLDER = ".unfinished"  # of prepare-data, in its output
HEAD_BYTES = 2**16  # of a file, to tell JSON from text
TRAIN_WORDS = {"train", "training"}
HELD_OUT_WORDS = {"valid", "validation", "val", "dev", "test", "testing", "eval", "evaluation"}
READABLE = "make it readable, or take it out of the input"
_copies = []  # of pipes, open so that they last as long as this process


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


def find_units(inputs: list[str], on_left_out: Callable[[Skipped], None] = lambda skipped: None) -> list[Unit]:
    """Every file that `inputs` name, in the order given; those of a folder by their relative path.

    `on_left_out` gets what is in a folder and not read; its `size` is in bytes.
    Raises ConfigError for an input that does not exist, holds nothing, or is a data set of which a split must be named,
    and DataError for what cannot be read.
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
        origin = os.fsencode(word).decode("utf-8", "backslashreplace").replace("\n", "\\n")  # a name is bytes, of any kind
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
            raise DataError(path, f"is a broken link to {os.readlink(path)}; mend or remove it") from problem
        raise ConfigError(path, "does not exist; name a file or a folder of text, JSON lines, Parquet or Arrow") from problem
    except OSError as problem:
        raise DataError(path, f"cannot be read: {problem.strerror}; {READABLE}") from problem


def _kind(mode: int) -> str:
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _copy_of_pipe(word: str) -> Path:
    """A temporary copy: an input is read more than once, and again after an interruption."""
    copy = tempfile.NamedTemporaryFile(prefix="olmo_train-")  # noqa: SIM115
    _copies.append(copy)
    with open(word, "rb") as pipe:
        shutil.copyfileobj(pipe, copy)
    copy.flush()
    return Path(copy.name)


def _format(path: Path) -> str:
    """What the suffix says; JSON in a file of another suffix is found by its contents. Raises DataError for UTF-16."""
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
    if format == "json":  # lines, or an array or object over many of them; one line is read alike either way
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


def _of_folder(folder: Path, on_left_out: Callable[[Skipped], None]) -> list[tuple[str, Path, str]]:
    """(format, file, origin) of a folder: its files of records when they are at least half of all, else the others as text."""
    files = [(_format(file), file) for file in _walk(folder, on_left_out)]
    if all(_suffix(file) == ".json" for _, file in files):
        records, texts = files, []
    else:  # a .json that is not of lines is, among other files, more often settings than records
        records = [(format, file) for format, file in files if format not in ("text", "json", "csv")]
        texts = [("text", file) for format, file in files if format in ("text", "json")]
    as_records = 2 * len(records) >= len(records) + len(texts)
    kept = records if as_records else texts
    if not kept:
        kept = files  # tables of separated values alone
    kept_files = {file for _, file in kept}
    if passed := [file for _, file in files if file not in kept_files]:
        kinds = ("files of records", "other files") if as_records else ("text files", "files of records or tables")
        _report(on_left_out, folder, "files of another kind than most in their folder", passed,
                f": {len(passed)} {kinds[1]}, such as {passed[0]}; the {len(kept)} {kinds[0]} are read")  # fmt: skip
    _refuse_splits(folder, [file for _, file in kept], as_records)
    return [(format, file, str(file)) for format, file in kept]


def _report(on_left_out: Callable[[Skipped], None], folder: Path, reason: str, files: Iterable[Path], detail: str = "") -> None:
    sizes = [os.lstat(file).st_size for file in files]
    if sizes:
        on_left_out(Skipped(str(folder), reason, detail, sum(sizes), len(sizes)))


def _walk(folder: Path, on_left_out: Callable[[Skipped], None]) -> list[Path]:
    """The files of a folder and of the folders in it, linked ones included, by their relative path."""

    def unreadable(problem: OSError) -> None:
        raise DataError(problem.filename, f"cannot be read: {problem.strerror}; {READABLE}") from problem

    files, hidden, described = [], [], []
    seen = {_identity(folder)}
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if _is_prepared(parent, folders, names):
            if Path(parent) == folder:
                raise ConfigError(folder, "is a folder that prepare-data wrote; name the text it was prepared from")
            on_left_out(Skipped(parent, "is a folder that prepare-data wrote", "; it is not read", records=0))
            folders[:] = []
            continue
        if "dataset_dict.json" in names:
            splits = sorted(name for name in folders if not name.startswith("."))
            raise ConfigError(parent, f"is a data set of several splits; name one: {', '.join(f'{parent}/{s}' for s in splits)}")
        hidden += [Path(parent, name) for name in (*folders, *names) if name.startswith(".")]
        inside, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
        for name in inside:
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
    _report(on_left_out, folder, "a name that begins with a dot", _all_files(hidden))
    _report(on_left_out, folder, "a description of a data set", described)
    if not files:
        raise ConfigError(folder, "holds no files")
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _identity(folder: Path) -> tuple[int, int]:
    status = _stat(folder)
    return status.st_dev, status.st_ino


def _is_prepared(parent: str, folders: list[str], names: list[str]) -> bool:
    """Whether prepare-data wrote the folder, or has begun to: an output inside the input is no input."""
    return WORK_FOLDER in folders or (META_FILE in names and DOCUMENTS_FILE in names)


def _all_files(paths: list[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            for parent, _, names in os.walk(path):
                yield from (Path(parent, name) for name in names)
        else:
            yield path


def _refuse_splits(folder: Path, files: list[Path], as_records: bool) -> None:
    """Training on a data set's held-out part must be the user's own wish, so a folder that has both is refused.

    A file's part is the first word of its relative path that names one: c4-train.00000-of-01024.json.gz, test/0.parquet,
    val.jsonl. In a folder of texts such words may be topics (train-travel.md) or programs (train.py): there, at least half
    of the files must name a part, and two must differ by it alone (wiki.train.tokens and wiki.test.tokens).
    """
    parts: dict[str, tuple[Path, set[str]]] = {}  # word: its first file, and what its files' names hold besides
    n = 0
    for file in files:
        words = re.findall(r"[^\W\d_]+", re.sub(r"\d+-of-\d+", "", _without_suffixes(file.relative_to(folder))).lower())
        word = next((word for word in words if word in TRAIN_WORDS | HELD_OUT_WORDS), None)
        if word:
            n += 1
            words.remove(word)
            parts.setdefault(word, (file, set()))[1].add(" ".join(words))
    train, held_out = ([parts[word] for word in sorted(parts) if word in of] for of in (TRAIN_WORDS, HELD_OUT_WORDS))
    if not as_records:
        alike = any(names & others for _, names in train for _, others in held_out)
        if not alike or 2 * n < len(files):
            return
    if train and held_out:
        raise ConfigError(folder, f"holds the splits {', '.join(sorted(parts))}; name the files of one, such as "
                                  f"{_name_of_part(folder, train[0][0])}")  # fmt: skip


def _without_suffixes(path: Path) -> str:
    """The path without the suffixes that tell its format; the words of another suffix, as of wiki.train.raw, stay."""
    while path.suffix.lower() in {*SUFFIXES, ".gz", ".zst", ".txt", ".md"}:
        path = path.with_suffix("")
    return str(path)


def _name_of_part(folder: Path, file: Path) -> str:
    """A word for the command line that names the part of a split's file: its folder, or a pattern of file names."""
    path = folder
    for name in file.relative_to(folder).parts:
        for match in re.finditer(r"[^\W\d_]+", name):
            if match[0].lower() in TRAIN_WORDS | HELD_OUT_WORDS:
                return str(path / (name[: match.end()] + ("*" if path / name == file else name[match.end() :])))
        path = path / name
    return str(file)

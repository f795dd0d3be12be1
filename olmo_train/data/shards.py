"""Token shards on disk, read as one stream of tokens: memory-mapped, copied only into the caller's array.

The files of a source are concatenated: `starts` holds the position at which each begins, and tokens, documents and label masks
are looked up by position. A source is either a folder written by prepare-data, described by its meta.json, or raw token files as
OLMo publishes them, of which only the size is known.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from olmo_train.data import remote
from olmo_train.data.config import SourceConfig
from olmo_train.data.documents import DOCUMENTS_FILE, Document, DocumentTable, scan_documents
from olmo_train.data.meta import BEGINS, META_FILE, PREPARE_AGAIN, SCORED, Meta, hash_blocks, hash_file, read_meta
from olmo_train.data.tokenizer import TokenizerRecord
from olmo_train.errors import ConfigError, DataError, did_you_mean, near_files, reason
from olmo_train.formats import counted
from olmo_train.storage import cache_folder

WHOLE_BYTES = 64 * 2**20  # a source up to this size is hashed completely when it is opened, a larger one in sampled blocks
RAW_BLOCKS = 4096  # blocks of 4 KiB hashed over all raw files of a source, evenly spread, the first and the last included
CHECKED_SHARDS = 256  # at most N shards of a large prepared source, evenly spread, have their blocks compared at opening


class TokenSource:
    """One logical token stream over all shards of a source, memory-mapped and read-only. Created by `open_source`."""

    def __init__(self, name: str, files: list[_ShardFile], meta: Meta | None, folder: Path | None, eos_id: int | None):
        self.name = name
        self.files = tuple(f.path for f in files)
        self.dtype = files[0].dtype
        self.starts = np.cumsum([0] + [f.n_tokens for f in files], dtype=np.int64)
        self.n_tokens = int(self.starts[-1])
        self.meta = meta
        self.folder = folder
        self.eos_id = meta.eos_id if meta else eos_id
        self.n_bytes = None if meta is None or meta.has_label_mask else meta.bytes
        self.has_label_mask = meta is not None and meta.has_label_mask
        self.marks_documents = meta is not None and meta.marks_documents  # else a document ends at each EOS
        self.pack = meta.pack if meta else None  # tokens of a window, which no document crosses
        self._starts = self.starts.tolist()  # bisect on a list is several times faster than on an array
        self._views = [_map(f.path, f.dtype, f.offset) for f in files]
        labels = [shard.labels for shard in meta.shards] if meta else [None] * len(files)
        self._labels = [_map(folder / shard["file"], np.dtype(np.uint8), 0) if shard else None for shard in labels]
        self.fingerprint = _fingerprint(files, meta)

    def shard_tokens(self, shard: int) -> int:
        return self._starts[shard + 1] - self._starts[shard]

    def tokenizer_record(self, where: str) -> TokenizerRecord | None:
        """The tokenizer that the source was prepared with; None for raw files, which record none."""
        return TokenizerRecord(where, self.meta.tokenizer, self.meta.tokenizer_sha256) if self.meta else None

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + len(out)) into `out`, of any integer dtype, across shard borders."""
        self._copy(self._views, start, out)

    def read_label_mask(self, start: int, out: np.ndarray) -> None:
        """Copy the label mask of the same span: 1 where the token is scored as a target. All ones without a mask."""
        self._copy(self._labels, start, out)
        if self.marks_documents:
            out &= SCORED

    def document_numbers(self, start: int, length: int) -> np.ndarray:
        """The number of each token's document in [start, start + length), (length,) int64, where label masks mark documents.
        The padding of a window counts as a document."""
        mask = np.empty(length, np.uint8)
        self._copy(self._labels, start, mask)
        return (mask // BEGINS).cumsum(dtype=np.int64)

    def _copy(self, views: list[np.ndarray | None], start: int, out: np.ndarray) -> None:
        starts, stop = self._starts, start + len(out)
        assert start >= 0 and stop <= self.n_tokens, (start, stop, self.n_tokens)
        shard, done = bisect_right(starts, start) - 1, 0
        while start < stop:
            end = min(stop, starts[shard + 1])
            view, begin = views[shard], starts[shard]
            out[done : done + end - start] = 1 if view is None else view[start - begin : end - begin]
            done, start, shard = done + end - start, end, shard + 1

    def documents(self, start: int, stop: int) -> list[Document]:
        """The documents that overlap [start, stop), in order; an EOS belongs to the document that it ends.

        In raw files they have no ids and are found by their EOS, within a bounded distance of the span; without an EOS, none.
        """
        found = []
        for shard in range(bisect_right(self._starts, start) - 1, len(self.files)):
            base = self._starts[shard]
            if base >= stop:
                break
            low, high = max(start - base, 0), min(stop, self._starts[shard + 1]) - base
            if self.meta:
                found += [d.shifted(base) for d in self._table.overlapping(shard, low, high)]
            elif self.eos_id is not None:
                origin = str(self.files[shard])
                found += [d.shifted(base) for d in scan_documents(self._views[shard], low, high, self.eos_id, origin)]
        return found

    def find_documents(self, words: set[str]) -> list[Document]:
        """The documents that these words name: `@N` is the one that holds token N; an id, every document that has it, in order.

        Raises DataError for an unknown word, or an id if the source is raw files; ConfigError for `@N` if no EOS is known.
        """
        positions = {word for word in words if word.startswith("@") and word[1:].isdigit()}
        found = [self._document_at(int(word[1:])) for word in sorted(positions)]
        ids = words - positions
        if not ids:
            return found
        if self.meta is None:
            raise DataError(
                self.name,
                f"is made of raw token files, which keep no ids of documents such as '{min(ids)}'; use prepare-data, "
                f"or {self.name}:@N for the one that holds token N",
            )
        return found + self._table.find(ids, self._starts)

    def _document_at(self, position: int) -> Document:
        if position >= self.n_tokens:
            raise DataError(self.name, f"has {counted(self.n_tokens, 'token')}, so there is none at {position}")
        if self.meta is None and self.eos_id is None:
            what = f"is needed to separate the documents of {self.name}, which is made of raw token files"
            raise ConfigError("data.eos_id", what)
        return self.documents(position, position + 1)[0]

    def end_with_eos(self, document: Document) -> int:
        """The position after the document's EOS; a raw file may end without one."""
        return min(document.end + 1, self._starts[bisect_right(self._starts, document.start)])

    @cached_property
    def _table(self) -> DocumentTable:
        return DocumentTable(self.folder)


@dataclass(frozen=True)
class _ShardFile:
    path: Path
    size: int  # bytes of the file
    offset: int  # bytes of a NumPy header before the tokens; 0 without
    dtype: np.dtype

    @property
    def n_tokens(self) -> int:
        return (self.size - self.offset) // self.dtype.itemsize


def open_source(
    name: str, config: SourceConfig, vocab_size: int, eos_id: int | None = None, where: str | None = None
) -> TokenSource:
    """Open a source and make the cheap checks: existence, sizes, dtype, vocabulary, a sample of contents and of ids.

    `vocab_size` and `eos_id` are the model's; `where` is the key or option that names the path, by default that of a source.
    Raises DataError with the file, the expected and the found value.
    """
    path = remote.localize(config.path)
    folder = Path(path) if isinstance(path, str) and Path(path).is_dir() else None
    if folder:
        meta = read_meta(folder)
        _check_meta(folder, meta, config, vocab_size, eos_id)
        files = [_prepared_file(folder, meta, i) for i in range(len(meta.shards))]
        _check_contents(folder, meta)
    else:
        meta, dtype = None, np.dtype(config.dtype or ("uint16" if vocab_size <= 2**16 else "uint32")).newbyteorder("<")
        where = where or f"data.sources.{name}.path"
        files = [_raw_file(where, file, dtype) for file in _expand(path)]
    source = TokenSource(name, files, meta, folder, eos_id)
    for shard in _evenly(len(source.files), 64):
        view = source._views[shard]
        for block in _evenly(-(-len(view) // 2048), 4):
            check_block(source, shard, block * 2048, view[block * 2048 : (block + 1) * 2048], vocab_size)
    return source


def check_ids(source: TokenSource, vocab_size: int, shards: Iterable[int] | None = None) -> None:
    """Check every token id, and every prepared shard's hash, once. `shards`: which ones, by number; None: all.

    A shard that passed is noted in the user's cache folder, by path, size, time of change and vocabulary, and not checked again.
    Raises DataError with file, offset (in tokens from the start of the file's tokens) and id.
    """
    for shard in range(len(source.files)) if shards is None else shards:
        file, view = source.files[shard], source._views[shard]
        mark = _check_mark(source, shard, vocab_size)
        if mark.exists():
            continue
        block = 2**22
        for start in range(0, len(view), block):
            check_block(source, shard, start, view[start : start + block], vocab_size)
        if source.meta:
            _check_hash(file, hash_file(file), source.meta.shards[shard].sha256)
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(f"{file} has passed with vocab_size {vocab_size}\n", encoding="utf-8", errors="replace")
        except OSError:  # without a writable cache the check only runs again next time
            pass


def _check_mark(source: TokenSource, shard: int, vocab_size: int) -> Path:
    file = source.files[shard].resolve()
    stat = file.stat()
    expected = source.meta.shards[shard].sha256 if source.meta else None
    key = json.dumps([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino, str(source.dtype), vocab_size, expected])
    return cache_folder() / "checked" / hashlib.sha256(key.encode()).hexdigest()


def check_block(source: TokenSource, shard: int, start: int, ids: np.ndarray, vocab_size: int) -> None:
    """Raises DataError when one of `ids`, which begin at token `start` of the shard, is not in the vocabulary."""
    if len(ids) and int(ids.max()) >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise DataError(
            source.files[shard],
            f"token {start + at} has id {int(ids[at])}, but the last id of the vocabulary is {vocab_size - 1}; "
            f"it was read as {source.dtype.name}: another dtype, another tokenizer, or model.vocab_size is too small; set "
            f"model.vocab_size to at least {int(ids.max()) + 1}, or name other data",
        )


def _check_hash(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(file, f"contents changed: sha256 {found}, meta.json has {expected}; {PREPARE_AGAIN}")


def _check_meta(folder: Path, meta: Meta, config: SourceConfig, vocab_size: int, eos_id: int | None) -> None:
    what = None
    if config.dtype not in (None, meta.dtype):
        what = f"dtype is {meta.dtype}, but the configuration says {config.dtype}; leave dtype out for a prepared folder"
    elif meta.vocab_size > vocab_size:
        fix = f"raise model.vocab_size from {vocab_size} to at least {meta.vocab_size}"
        what = f"vocab_size is {meta.vocab_size}, above the model's; {fix}"
    elif eos_id not in (None, meta.eos_id):
        what = f"eos_id is {meta.eos_id} ({meta.eos_text!r}), but the configuration says {eos_id}; use one tokenizer and --eos"
    elif not meta.shards:
        what = f"names no shards, so there is nothing to read; {PREPARE_AGAIN}"
    if what:
        raise DataError(folder / META_FILE, what)


def _prepared_file(folder: Path, meta: Meta, index: int) -> _ShardFile:
    shard, dtype = meta.shards[index], np.dtype(meta.dtype).newbyteorder("<")
    for file, size in [(shard.file, shard.size)] + ([(shard.labels["file"], shard.tokens)] if shard.labels else []):
        found = _size(folder / file)
        if found != size:
            what = f"has {found} bytes, but {META_FILE} says {size}; {PREPARE_AGAIN}"
            raise DataError(folder / file, what)
    if shard.size != shard.tokens * dtype.itemsize or shard.tokens == 0:
        what = f"{shard.file}: {shard.tokens} tokens of {meta.dtype} are not {shard.size} bytes; {PREPARE_AGAIN}"
        raise DataError(folder / META_FILE, what)
    return _ShardFile(folder / shard.file, shard.size, 0, dtype)


def _is_small(meta: Meta) -> bool:
    """Whether a source is hashed completely when it is opened."""
    return sum(shard.size for shard in meta.shards) <= WHOLE_BYTES


def _check_contents(folder: Path, meta: Meta) -> None:
    """Compare contents with meta.json's hashes: all of a small source, blocks of a large one."""
    whole = _is_small(meta)
    for index in range(len(meta.shards)) if whole else _evenly(len(meta.shards), CHECKED_SHARDS):
        shard = meta.shards[index]
        file = folder / shard.file
        _check_hash(file, *((hash_file(file), shard.sha256) if whole else (hash_blocks(file), shard.blocks_sha256)))


def check_prepared(folder: Path, meta: Meta) -> None:
    """Compare the files of a prepared folder with its meta.json, as at the start of a training. Raises DataError."""
    for index in range(len(meta.shards)):
        _prepared_file(folder, meta, index)
    _check_contents(folder, meta)
    if _is_small(meta):
        _check_hash(folder / DOCUMENTS_FILE, hash_file(folder / DOCUMENTS_FILE), meta.documents_sha256)


def _expand(path: str | tuple[str, ...]) -> list[Path]:
    """The files that a path, list or glob names, in the order of the list; the files of a glob by name."""
    files = []
    for word in [path] if isinstance(path, str) else path:
        matches = [word]
        if glob.has_magic(word) and not Path(word).exists():  # [ may also be a part of a folder's name
            matches = sorted(glob.glob(word, recursive=True) or glob.glob(word.replace("[", "[[]"), recursive=True))
        if not matches:
            raise DataError(word, f"matches no file{_looked_for(word)}")
        if folders := [match for match in matches if Path(match).is_dir()]:
            why = f"names the folder {folders[0]}" if folders[0] != word else "is a folder inside a list"
            raise DataError(word, f"{why}; name raw token files, or one prepared folder for one source")
        files += [Path(match) for match in matches]
    return files


def _raw_file(where: str, file: Path, dtype: np.dtype) -> _ShardFile:
    size, offset = _size(file, where), 0
    try:
        with open(file, "rb") as stream:
            if stream.read(6) == b"\x93NUMPY":
                offset = _numpy_header(file, stream, dtype)
    except OSError as problem:
        raise DataError(file, f"cannot be read: {problem.strerror}; change its permissions, or name another file") from problem
    if size <= offset:
        raise DataError(file, "is an empty shard; leave it out or make it again")
    if (size - offset) % dtype.itemsize:
        what = f"has {size - offset} bytes, no multiple of {dtype.itemsize} ({dtype.name}): cut short, or another dtype"
        raise DataError(file, what)
    return _ShardFile(file, size, offset, dtype)


def _numpy_header(file: Path, stream, dtype: np.dtype) -> int:
    """Bytes of the NumPy header. Raises DataError unless the array has one dimension and the dtype of the tokens."""
    try:
        version = tuple(stream.read(2))
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, found = read(stream)
    except (ValueError, OSError) as problem:
        raise DataError(file, f"begins as a NumPy file, but its header cannot be read: {reason(problem)}") from problem
    if found != dtype or len(shape) != 1:
        raise DataError(file, f"has a NumPy header of {found} and shape {shape}, expected one row of {dtype.name}; set dtype")
    return stream.tell()


def _size(file: Path, where: str | None = None) -> int:
    """Bytes of a shard, or of a file that the key or option `where` names."""
    try:
        return file.stat().st_size
    except OSError as problem:
        if where and isinstance(problem, FileNotFoundError | NotADirectoryError):
            raise DataError(where, f"{file} does not exist{_looked_for(file)}; {_how_to_make(file)}") from problem
        fix = "change its permissions, or name other data" if where else PREPARE_AGAIN
        raise DataError(file, f"cannot be opened: {problem.strerror}; {fix}") from problem


def _how_to_make(file: Path) -> str:
    """What to type instead of data that do not exist, or to make them."""
    if meant := [name for name in near_files(file) if Path(name).is_dir() or name.endswith((".npy", ".bin"))]:
        return did_you_mean(meant)
    if file.suffix in (".npy", ".bin"):
        return "name an existing token file, or a folder that prepare-data wrote"
    folder, more = (file.parent, " --validation-fraction 0.05") if file.name == "validation" else (file, "")
    return f"make it first: olmo-train prepare-data TEXT --output {folder} --tokenizer FILE{more}"


def _looked_for(path: str | Path) -> str:
    """What a relative path means in full, in parentheses."""
    return "" if Path(path).is_absolute() else f" ({Path.cwd() / path})"


def _map(file: Path, dtype: np.dtype, offset: int) -> np.ndarray:
    """A memory-mapped file as a plain array, which is several times faster to slice than an np.memmap. Read-only."""
    try:
        with open(file, "rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as problem:
        raise DataError(file, f"cannot be memory-mapped: {reason(problem)}") from problem
    if hasattr(mmap, "MADV_RANDOM"):  # instances are read in random order, so read-ahead would be wasted
        mapping.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapping, dtype, offset=offset)


def _fingerprint(files: list[_ShardFile], meta: Meta | None) -> str:
    """sha256 of the order, sizes and contents of the files, not of their paths, so that a copied source is the same source.

    Contents are the hashes in meta.json; of raw files, all bytes up to WHOLE_BYTES, else RAW_BLOCKS blocks.
    """
    if meta:
        parts = [[shard.size, shard.sha256, shard.labels and shard.labels["sha256"]] for shard in meta.shards]
    else:
        whole, blocks = sum(f.size for f in files) <= WHOLE_BYTES, max(2, RAW_BLOCKS // len(files))
        parts = [[f.size, hash_file(f.path) if whole else hash_blocks(f.path, blocks)] for f in files]
    return hashlib.sha256(json.dumps([files[0].dtype.name, parts]).encode()).hexdigest()


def _evenly(n: int, most: int) -> list[int]:
    """At most `most` of range(n), evenly spread, the first and the last among them."""
    return list(range(n)) if n <= most else sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})

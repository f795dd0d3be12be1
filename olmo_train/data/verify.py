"""verify-data: check a prepared folder against itself.

meta.json, the shards, documents.parquet and tokenizer.json state the same facts. All that could disagree is compared, and every
mismatch is reported with file, offset, expected and found value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olmo_train.data.documents import DOCUMENTS_FILE, ID_DTYPE, IDS_FILE, DocumentTable, id_hash
from olmo_train.data.meta import BEGINS, META_FILE, SCORED, TOKENIZER_FILE, Meta, ShardMeta, hash_file, read_meta
from olmo_train.data.tokenizer import from_json
from olmo_train.errors import DataError, reason
from olmo_train.formats import counted

BLOCK = 2**22  # tokens checked at a time
LOOKUPS = 256  # ids looked up to check documents.ids


@dataclass(frozen=True)
class Problem:
    """One mismatch."""

    file: Path
    what: str  # with offset (in tokens or rows), expected and found


def verify(folder: Path, on_shard: Callable[[str], None] = lambda name: None) -> tuple[Meta, list[Problem]]:
    """(meta.json, all problems) of a prepared folder. Raises DataError when meta.json cannot be read."""
    meta = read_meta(folder)
    problems = list(_tokenizer(folder, meta))
    table = None
    try:
        table = DocumentTable(folder)
        problems += _documents_file(folder, meta, table)
    except DataError as problem:
        problems.append(Problem(folder / DOCUMENTS_FILE, str(problem).partition(": ")[2]))
    if meta.pack and meta.tokens % meta.pack != 1:
        what = f"expected a multiple of the window's {meta.pack} tokens and one more, found {meta.tokens:,} tokens"
        problems.append(Problem(folder / META_FILE, what))
    documents = padding = base = 0
    for index, shard in enumerate(meta.shards):
        on_shard(shard.file)
        starts, ends, found = _document_spans(folder, table, meta, index, base) if table else (None, None, [])
        problems += found
        problems += _shard(folder, meta, shard, ends)
        problems += _labels(folder, shard, meta, None if found else starts, ends, base)
        documents += 0 if ends is None else len(ends)
        padding += 0 if ends is None else shard.tokens - int((ends - starts + 1).sum())
        base += shard.tokens
    if table and not problems and padding != meta.padding:
        problems.append(Problem(folder / META_FILE, f"padding: expected {meta.padding:,}, found {padding:,}"))
    if table and documents != meta.documents:
        problems.append(Problem(folder / DOCUMENTS_FILE, f"expected {counted(meta.documents, 'document')}, found {documents:,}"))
    if table and not problems:  # else lookups would repeat another problem
        problems += _ids(folder, meta, table)
    return meta, problems


def _tokenizer(folder: Path, meta: Meta) -> Iterator[Problem]:
    file = folder / TOKENIZER_FILE
    try:
        text = file.read_bytes()
        yield from _hash(file, meta.tokenizer_sha256, hashlib.sha256(text).hexdigest())
        try:
            tokenizer = from_json(text.decode(), str(file), eos=meta.eos_text)
        except DataError:  # it has no such token; compare with the one that it has
            tokenizer = from_json(text.decode(), str(file))
    except (OSError, UnicodeDecodeError, DataError) as problem:
        yield Problem(file, f"cannot be read: {reason(problem)}")
        return
    for key in ("vocab_size", "eos_id", "eos_text"):
        if getattr(tokenizer, key) != getattr(meta, key):
            yield Problem(file, f"{key}: expected {getattr(meta, key)!r} ({META_FILE}), found {getattr(tokenizer, key)!r}")


def _hash(file: Path, expected: str, found: str) -> Iterator[Problem]:
    if found != expected:
        yield Problem(file, f"expected sha256 {expected}, found {found}")


def _size(file: Path) -> int | str:
    """Bytes of a file, to compare and to print."""
    return file.stat().st_size if file.exists() else "no such file"


def _documents_file(folder: Path, meta: Meta, table: DocumentTable) -> Iterator[Problem]:
    file = folder / DOCUMENTS_FILE
    yield from _hash(file, meta.documents_sha256, hash_file(file))
    if table.n_documents != meta.documents:
        yield Problem(file, f"expected {counted(meta.documents, 'row')}, found {table.n_documents:,}")


def _document_spans(
    folder: Path, table: DocumentTable, meta: Meta, index: int, base: int
) -> tuple[np.ndarray, np.ndarray, list[Problem]]:
    """(documents of the shard,) the start of each, and the end, where its EOS must be. They must follow one another without gaps.

    In a packed source, a gap is the padding at the end of a window, and none crosses a window. `base`: tokens before the shard.
    """
    file, shard, pack = folder / DOCUMENTS_FILE, meta.shards[index], meta.pack
    try:
        starts, ends = table.spans(index)
    except DataError as problem:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), [Problem(file, str(problem))]
    before = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else starts
    windows = before if not pack else -(-(before + base) // pack) * pack - base  # where the next window begins
    wrong = np.flatnonzero(((starts != before) & (starts != windows)) | (ends < starts))
    if len(wrong):
        at = int(wrong[0])
        what = f"shard {index}, document {at}: expected start {before[at]}, found {starts[at]} to {ends[at]}"
        return starts, ends, [Problem(file, what)]
    crossing = np.flatnonzero((starts + base) // pack != (ends + base) // pack) if pack else ends[:0]
    if len(crossing):
        at = int(crossing[0])
        what = f"shard {index}, document {at}: expected no document across a window of {pack}, found {starts[at]} to {ends[at]}"
        return starts, ends, [Problem(file, what)]
    last = int(ends[-1]) + 1 if len(ends) else 0
    if last != shard.tokens and not (pack and last < shard.tokens):
        return starts, ends, [Problem(file, f"shard {index}: expected documents up to token {shard.tokens}, found {last}")]
    return starts, ends, []


def _shard(folder: Path, meta: Meta, shard: ShardMeta, ends: np.ndarray | None) -> Iterator[Problem]:
    """Size, hash, range of ids, and an EOS at the end of each document and nowhere else."""
    file, dtype = folder / shard.file, np.dtype(meta.dtype).newbyteorder("<")
    size = _size(file)
    if size != shard.size or size != shard.tokens * dtype.itemsize:
        expected = f"expected {shard.size} bytes for {shard.tokens} tokens of {meta.dtype}"
        yield Problem(file, f"{expected}, found {size}{_header(file)}")
        return
    digest, named = hashlib.sha256(), set()
    with open(file, "rb") as stream:
        for start in range(0, shard.tokens, BLOCK):
            data = stream.read(BLOCK * dtype.itemsize)
            digest.update(data)
            ids = np.frombuffer(data, dtype)
            for kind, problem in _block(file, meta, start, ids, ends):
                if kind not in named:  # the first of each kind is enough to find the others
                    named.add(kind)
                    yield problem
    yield from _hash(file, shard.sha256, digest.hexdigest())


def _header(file: Path) -> str:
    if not file.exists():
        return ""
    with open(file, "rb") as stream:
        return ", beginning with a NumPy header" if stream.read(6) == b"\x93NUMPY" else ""


def _block(file: Path, meta: Meta, start: int, ids: np.ndarray, ends: np.ndarray | None) -> Iterator[tuple[str, Problem]]:
    beyond = np.flatnonzero(ids >= meta.vocab_size)
    if len(beyond):
        at = int(beyond[0])
        yield "range", Problem(file, f"token {start + at}: expected an id below {meta.vocab_size}, found {ids[at]}")
    if ends is None:
        return
    expected = ends[np.searchsorted(ends, start) : np.searchsorted(ends, start + len(ids))] - start
    missing = expected[ids[expected] != meta.eos_id]
    if len(missing):
        at = int(missing[0])
        yield "missing", Problem(file, f"token {start + at}: expected EOS {meta.eos_id} (a document ends), found {ids[at]}")
    if meta.marks_documents:  # a template's turns and padding have EOS too; label masks mark the documents
        return
    found = np.flatnonzero(ids == meta.eos_id)
    extra = found[~np.isin(found, expected)]
    if len(extra):
        at = start + int(extra[0])
        yield "extra", Problem(file, f"token {at}: expected no EOS inside a document, found {meta.eos_id}")


def _labels(
    folder: Path, shard: ShardMeta, meta: Meta, starts: np.ndarray | None, ends: np.ndarray | None, base: int
) -> Iterator[Problem]:
    """Size, hash and values of a label mask; with marks, also where documents begin, and that padding is not scored."""
    if not shard.labels:
        if meta.marks_documents:
            yield Problem(folder / META_FILE, f"{shard.file}: expected a label mask that marks its documents, found none")
        return
    file = folder / shard.labels["file"]
    if _size(file) != shard.tokens:
        yield Problem(file, f"expected {shard.tokens} bytes, found {_size(file)}")
        return
    yield from _hash(file, shard.labels["sha256"], hash_file(file))
    mask, most = np.memmap(file, np.uint8, mode="r"), SCORED | BEGINS if meta.marks_documents else SCORED
    for start in range(0, len(mask), BLOCK):
        wrong = np.flatnonzero(mask[start : start + BLOCK] > most)
        if len(wrong):
            at = start + int(wrong[0])
            yield Problem(file, f"token {at}: expected 0 {'or' if most == 1 else 'to'} {most}, found {mask[at]}")
            return
    if meta.marks_documents and starts is not None:
        yield from _marks(file, mask, meta, starts, ends, base + len(mask) == meta.tokens)


def _marks(file: Path, mask: np.ndarray, meta: Meta, starts: np.ndarray, ends: np.ndarray, is_last: bool) -> Iterator[Problem]:
    """BEGINS at the first token of each document and of each padding, where nothing is scored; each document's EOS is scored."""
    follows = np.append(starts[1:], len(mask)) if len(starts) else starts
    fills = (ends + 1)[ends + 1 < follows]
    expected = np.unique(np.concatenate([starts, fills, [len(mask) - 1] if meta.pack and is_last else []])).astype(np.int64)
    found = np.flatnonzero(mask & BEGINS)
    if not np.array_equal(found, expected):
        at = int(np.setxor1d(found, expected)[0])
        yield Problem(
            file, f"token {at}: expected {'a' if at in expected else 'no'} mark of a document's begin, found {mask[at]}"
        )
        return
    scored = mask & SCORED
    inside = np.zeros(len(mask) + 1, np.int8)
    inside[starts + 1] += 1  # nothing comes before the first token
    inside[ends + 1] -= 1
    outside = np.flatnonzero(scored & (inside[:-1].cumsum(dtype=np.int8) == 0))
    if len(outside):
        at = int(outside[0])
        yield Problem(file, f"token {at}: expected padding and a document's first token to be unscored, found {mask[at]}")
    unscored = ends[scored[ends] == 0]
    if len(unscored):
        at = int(unscored[0])
        yield Problem(file, f"token {at}: expected the EOS of a document to be scored, found {mask[at]}")


def _ids(folder: Path, meta: Meta, table: DocumentTable) -> Iterator[Problem]:
    """Size and order of documents.ids; and documents, evenly spread over the folder, are found by their ids."""
    file, expected = folder / IDS_FILE, meta.documents * ID_DTYPE.itemsize
    if _size(file) != expected:
        yield Problem(file, f"expected {expected} bytes, found {_size(file)}")
        return
    rows = np.memmap(file, ID_DTYPE, mode="r")
    starts = np.cumsum([0] + [shard.tokens for shard in meta.shards]).tolist()
    for row in {round(i * (len(rows) - 1) / LOOKUPS) for i in range(LOOKUPS + 1)}:
        if row and rows[row - 1]["hash"] > rows[row]["hash"]:
            yield Problem(file, f"row {row}: expected hashes in order, found {rows[row - 1]['hash']} before {rows[row]['hash']}")
            return
        at = int(rows[row]["start"])
        shard = int(np.searchsorted(starts, at, side="right")) - 1
        found = table.overlapping(shard, at - starts[shard], at - starts[shard] + 1) if 0 <= at < starts[-1] else []
        if not found or found[0].start != at - starts[shard] or id_hash(found[0].id) != int(rows[row]["hash"]):
            yield Problem(file, f"row {row}: expected the start of a document with that id, found token {at}")
            return

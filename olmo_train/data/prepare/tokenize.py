"""Tokenize chunks of text, in worker processes or in this one, and return the results in order.

The number of chunks in flight is bounded, so memory stays constant for any input size, also when workers differ in speed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

import numpy as np

from olmo_train.data.prepare.chunks import TRAILING, Chunk, Skipped
from olmo_train.data.prepare.readers import Record, records
from olmo_train.data.prepare.writer import Tokenized
from olmo_train.data.tokenizer import Tokenizer, from_json
from olmo_train.errors import DataError

BATCH_BYTES = 2**18  # text that the tokenizer is given at once: more costs memory and gains no speed
NO_TEXT = "has no text"  # reason
UNKNOWN_TEXT = "has no character that the tokenizer knows"  # reason
EOS_INSIDE = "has text that the tokenizer encodes as the end of a document"  # reason
HARMLESS = {NO_TEXT, TRAILING}  # reasons that do not stop with --on-error stop


@dataclass
class ChunkResult:
    documents: Tokenized
    skipped: list[Skipped]
    left_out: dict[str, dict[str, int]]  # reason: {"records": n, "bytes": n}; every record is here or in `documents`
    input_bytes: int  # those of `left_out` are some of these; the others are the documents'


def tokenize_chunks(chunks: Iterable[Chunk], tokenizer: Tokenizer, text_field: str, workers: int) -> Iterator[ChunkResult]:
    """One result a chunk, in order. Raises DataError when a worker died (of memory, most often)."""
    if workers == 1:
        with _one_thread():
            for chunk in chunks:
                yield tokenize_chunk(chunk, tokenizer, text_field)
        return
    context = get_context("spawn")  # a fork would copy pyarrow's threads in an unusable state
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.json, tokenizer.name, tokenizer.eos_text, text_field))
    under_way: deque = deque()
    try:
        for chunk in chunks:
            under_way.append(pool.submit(_work, chunk))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as problem:
        raise DataError("prepare-data", "a worker was killed (out of memory?); run again with fewer --workers") from problem
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Tokenizer, str]  # set once in each worker; the second is the field that holds the text


def _start_worker(tokenizer_json: str, name: str, eos: str, text_field: str) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the main one decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = (from_json(tokenizer_json, name, eos=eos), text_field)


def _die_with_parent() -> None:
    """A main process that was killed outright cannot stop its workers, and they would wait for ever."""
    parent_process().join()
    os._exit(1)


def _work(chunk: Chunk) -> ChunkResult:
    return tokenize_chunk(chunk, *_worker)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def tokenize_chunk(chunk: Chunk, tokenizer: Tokenizer, text_field: str) -> ChunkResult:
    """Parse a chunk and tokenize its records, each followed by EOS."""
    kept: list[Record] = []
    skipped: list[Skipped] = []
    left_out: dict[str, dict[str, int]] = {}

    def leave_out(reason: str, records: int, size: int) -> None:
        count_left_out(left_out, reason, records, chunk.input_bytes * size // max(chunk.content, 1))

    for record in records(chunk, text_field):
        if isinstance(record, Skipped):
            skipped.append(record)
            leave_out(record.reason, record.records, record.size)
        elif any(text for text, _ in record.segments):
            kept.append(record)
        else:
            leave_out(NO_TEXT, 1, record.size)
    pieces = iter(list(_encode([text for record in kept for text, _ in record.segments], tokenizer)))
    encoded: list[tuple[Record, list[np.ndarray]]] = []
    for record in kept:
        arrays = [next(pieces) for _ in record.segments]
        if reason := _why_unusable(arrays, tokenizer):
            skipped.append(Skipped(_place(record), reason, size=record.size))
            leave_out(reason, 1, record.size)
        else:
            encoded.append((record, arrays))
    documents = _join(encoded, tokenizer)
    rest = chunk.input_bytes - sum(counts["bytes"] for counts in left_out.values())
    if rest and not len(documents):  # blank lines and the like have no document to be counted with
        count_left_out(left_out, next(reversed(left_out), "holds no records"), 0, rest)
    return ChunkResult(documents, skipped, left_out, chunk.input_bytes)


def count_left_out(left_out: dict[str, dict[str, int]], reason: str, records: int, bytes: int) -> None:
    """Add to the counts of a reason in an account's `left_out`."""
    counts = left_out.setdefault(reason, {"records": 0, "bytes": 0})
    counts["records"] += records
    counts["bytes"] += bytes


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield from tokenizer.encode_batch(batch)
            batch, size = [], 0
    if batch:
        yield from tokenizer.encode_batch(batch)


def _why_unusable(arrays: list[np.ndarray], tokenizer: Tokenizer) -> str | None:
    """Why these tokens of a record are no document; None when they are one. An EOS inside would end it there."""
    if not any(map(len, arrays)):
        return UNKNOWN_TEXT
    return EOS_INSIDE if any((ids == tokenizer.eos_id).any() for ids in arrays) else None


def _join(encoded: list[tuple[Record, list[np.ndarray]]], tokenizer: Tokenizer) -> Tokenized:
    """Put the segments of each record together, EOS behind it. EOS is scored: to end is a part of the answer."""
    eos = np.array([tokenizer.eos_id], tokenizer.dtype)
    kept = [record for record, _ in encoded]
    arrays, scored, lengths = [], [], np.zeros(len(kept), np.int64)
    for i, (record, pieces) in enumerate(encoded):
        for ids, (_, is_scored) in zip(pieces, record.segments, strict=True):
            arrays.append(ids)
            scored.append(is_scored)
            lengths[i] += len(ids)
        arrays.append(eos)
        scored.append(True)
    mask = None
    if not all(scored):
        mask = np.repeat(np.array(scored, np.uint8), [len(array) for array in arrays])
    return Tokenized(
        tokens=np.concatenate(arrays) if arrays else eos[:0],
        lengths=lengths,
        mask=mask,
        ids=[record.id or _place(record) for record in kept],
        origins=[record.origin for record in kept],
        records=[record.record for record in kept],
        bytes=np.array([sum(len(text.encode()) for text, _ in record.segments) for record in kept], np.int64),
    )


def _place(record: Record) -> str:
    """The id of a record that does not have one."""
    return record.origin if record.record is None else f"{record.origin}:{record.record}"

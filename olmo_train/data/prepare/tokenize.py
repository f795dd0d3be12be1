"""Tokenize chunks of text, in worker processes or in this one, and return the results in order.

The number of chunks in flight is bounded, so memory stays constant for any input size and any speed of the workers.
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
from olmo_train.data.prepare.readers import Record, Tail, cut, records
from olmo_train.data.prepare.writer import Tokenized
from olmo_train.data.tokenizer import Tokenizer, from_json
from olmo_train.errors import DataError

BATCH_CHARACTERS = 2**18  # of text per call of the tokenizer; more costs memory and gains no speed
NO_TEXT = "has no text"  # reason
UNKNOWN_TEXT = "has no character that the tokenizer knows"  # reason
UNKNOWN_CHARACTERS = "characters that the tokenizer does not know"  # reason; the document is kept without them
EOS_INSIDE = "has text that the tokenizer encodes as the end of a document"  # reason
HARMLESS = {NO_TEXT, TRAILING}  # reasons that do not stop with --on-error stop


@dataclass
class ChunkResult:
    """What became of a chunk."""

    documents: Tokenized
    skipped: list[Skipped]
    left_out: dict[str, dict[str, int]]  # reason: {"records": n, "bytes": n}; every record is here or in `documents`
    input_bytes: int  # of the chunk: those in `left_out` and those of the documents


def tokenize_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, text_field: str, workers: int, tail: Tail | None = None
) -> Iterator[ChunkResult]:
    """One result per chunk, in order; the document with a `tail` becomes two. Raises DataError when a worker died, most often
    because memory ran out."""
    if workers == 1:
        with _one_thread():
            for chunk in chunks:
                yield tokenize_chunk(chunk, tokenizer, text_field, tail)
        return
    context = get_context("spawn")  # a fork would copy pyarrow's threads in an unusable state
    arguments = (tokenizer.json, tokenizer.name, tokenizer.eos_text, text_field, tail)
    pool = ProcessPoolExecutor(workers, context, _start_worker, arguments)
    in_flight: deque = deque()
    try:
        for chunk in chunks:
            in_flight.append(pool.submit(_work, chunk))
            if len(in_flight) > 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as problem:
        raise DataError("prepare-data", "a worker was killed (out of memory?); run again with fewer --workers") from problem
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Tokenizer, str, Tail | None]  # set once in each worker: what tokenize_chunk takes beside the chunk


def _start_worker(tokenizer_json: str, name: str, eos: str, text_field: str, tail: Tail | None) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the main process stops the others
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = (from_json(tokenizer_json, name, eos=eos), text_field, tail)


def _die_with_parent() -> None:
    """End this worker with its main process, which cannot stop it if it is killed."""
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


def tokenize_chunk(chunk: Chunk, tokenizer: Tokenizer, text_field: str, tail: Tail | None = None) -> ChunkResult:
    """Parse a chunk and tokenize its records, each followed by EOS."""
    kept: list[Record] = []
    skipped: list[Skipped] = []
    left_out: dict[str, dict[str, int]] = {}

    def leave_out(loss: Skipped) -> None:
        count_left_out(left_out, loss.reason, loss.records, chunk.input_bytes * loss.size // max(chunk.content, 1))
        if loss.reason != NO_TEXT:
            skipped.append(loss)

    for record in cut(records(chunk, text_field), tail):
        if isinstance(record, Skipped):
            leave_out(record)
        elif any(text for text, _ in record.segments):
            kept.append(record)
        else:
            leave_out(Skipped(record.place, NO_TEXT, size=record.size))
    pieces = iter(_encode([text for record in kept for text, _ in record.segments], tokenizer))
    encoded: list[tuple[Record, list[np.ndarray], int]] = []  # with the bytes of text that the tokens stand for
    for record in kept:
        arrays = [next(pieces) for _ in record.segments]
        if not any(map(len, arrays)):
            leave_out(Skipped(record.place, UNKNOWN_TEXT, size=record.size))
        elif any((ids == tokenizer.eos_id).any() for ids in arrays):  # the document would end there
            leave_out(Skipped(record.place, EOS_INSIDE, size=record.size))
        else:
            dropped = sum(tokenizer.dropped_bytes(text) for text, _ in record.segments)
            encoded.append((record, arrays, sum(len(text.encode()) for text, _ in record.segments) - dropped))
            if dropped:
                leave_out(Skipped(record.place, UNKNOWN_CHARACTERS, f", {dropped} bytes", dropped, records=0))
    documents = _join(encoded, tokenizer)
    rest = chunk.input_bytes - sum(counts["bytes"] for counts in left_out.values())
    if rest and not len(documents):  # blank lines and separators, which otherwise count with the documents
        count_left_out(left_out, next(reversed(left_out), "holds no records"), 0, rest)
    return ChunkResult(documents, skipped, left_out, chunk.input_bytes)


def count_left_out(left_out: dict[str, dict[str, int]], reason: str, records: int, bytes: int) -> None:
    """Add to the counts of a reason in an account's `left_out`."""
    counts = left_out.setdefault(reason, {"records": 0, "bytes": 0})
    counts["records"] += records
    counts["bytes"] += bytes


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each text, in calls of about BATCH_CHARACTERS."""
    found, first, size = [], 0, 0
    for i, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BATCH_CHARACTERS or i == len(texts):
            found += tokenizer.encode_batch(texts[first:i])
            first, size = i, 0
    return found


def _join(encoded: list[tuple[Record, list[np.ndarray], int]], tokenizer: Tokenizer) -> Tokenized:
    """Concatenate the segments of each record, with an EOS after each record. The EOS is scored, as it ends the answer."""
    eos = np.array([tokenizer.eos_id], tokenizer.dtype)
    arrays, scored, lengths = [], [], []
    for record, pieces, _ in encoded:
        arrays += [*pieces, eos]
        scored += [*(is_scored for _, is_scored in record.segments), True]
        lengths.append(sum(map(len, pieces)))
    mask = None
    if not all(scored):
        mask = np.repeat(np.array(scored, np.uint8), [len(array) for array in arrays])
    kept = [record for record, _, _ in encoded]
    return Tokenized(
        tokens=np.concatenate(arrays) if arrays else eos[:0],
        lengths=np.array(lengths, np.int64),
        mask=mask,
        ids=[record.id or record.place for record in kept],
        origins=[record.origin for record in kept],
        records=[record.record for record in kept],
        bytes=np.array([size for _, _, size in encoded], np.int64),
    )

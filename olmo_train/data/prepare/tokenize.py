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
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np

from olmo_train.data.meta import BEGINS, marks_documents
from olmo_train.data.prepare.chunks import TRAILING, Chunk, Skipped
from olmo_train.data.prepare.readers import Record, Tail, cut, records
from olmo_train.data.prepare.tokenized import Tokenized
from olmo_train.data.templates import TEMPLATES, ChatFormat, texts_of
from olmo_train.data.tokenizer import Tokenizer, from_json
from olmo_train.errors import DataError

BATCH_CHARACTERS = 2**18  # of text per call of the tokenizer; more costs memory and gains no speed
NO_TEXT = "has no text"  # reason
UNKNOWN_TEXT = "has no character that the tokenizer knows"  # reason
UNKNOWN_CHARACTERS = "characters that the tokenizer does not know"  # reason; the document is kept without them
EOS_INSIDE = "has text that the tokenizer encodes as the end of a document"  # reason
TOO_LONG = "does not fit in a window of --pack"  # reason
HARMLESS = {NO_TEXT, TRAILING, TOO_LONG}  # reasons that do not stop with --on-error stop


@dataclass(frozen=True)
class Encoding:
    """How records become documents: the options of prepare-data that a worker needs."""

    text_field: str = "text"
    template: str | None = None  # a row of TEMPLATES; None: segments are joined as they are
    instruction: str | None = None  # text before the first message of the user
    pack: int | None = None  # most tokens of a document, with its EOS
    cut: str | None = None  # prompt: a prompt is cut where its document is longer than `pack`
    tail: Tail | None = None  # the document that becomes two


class Encoded(NamedTuple):
    """A record as ids."""

    record: Record
    arrays: list[np.ndarray]  # its parts, without the EOS at the end
    scored: list[bool]  # of each part
    bytes: int  # of the text that the ids stand for
    dropped: int  # bytes of the text that the tokenizer does not know


@dataclass
class ChunkResult:
    """What became of a chunk."""

    documents: Tokenized
    skipped: list[Skipped]
    left_out: dict[str, dict[str, int]]  # reason: {"records": n, "bytes": n}; every record is here or in `documents`
    input_bytes: int  # of the chunk: those in `left_out` and those of the documents
    cut_prompts: int = 0  # documents whose prompt was cut


def tokenize_chunks(chunks: Iterable[Chunk], tokenizer: Tokenizer, how: Encoding, workers: int) -> Iterator[ChunkResult]:
    """One result per chunk, in order; a document with a tail becomes two. Raises DataError when a worker died, most often
    because memory ran out."""
    if workers == 1:
        with _one_thread():
            for chunk in chunks:
                yield tokenize_chunk(chunk, tokenizer, how)
        return
    context = get_context("spawn")  # a fork would copy pyarrow's threads in an unusable state
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.json, tokenizer.name, tokenizer.eos_text, how))
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


_worker: tuple[Tokenizer, Encoding]  # set once in each worker


def _start_worker(tokenizer_json: str, name: str, eos: str, how: Encoding) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the main process stops the others
    threading.Thread(target=_die_with_parent, daemon=True).start()
    markers = TEMPLATES[how.template].markers if how.template else ()
    _worker = (from_json(tokenizer_json, name, eos=eos, markers=markers), how)


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


def tokenize_chunk(chunk: Chunk, tokenizer: Tokenizer, how: Encoding) -> ChunkResult:
    """Parse a chunk and tokenize its records, each followed by EOS."""
    chat = ChatFormat(how.template, tokenizer, how.instruction) if how.template else None
    kept: list[Record] = []
    skipped: list[Skipped] = []
    left_out: dict[str, dict[str, int]] = {}

    def leave_out(loss: Skipped) -> None:
        count_left_out(left_out, loss.reason, loss.records, chunk.input_bytes * loss.size // max(chunk.content, 1))
        if loss.reason != NO_TEXT:
            skipped.append(loss)

    for record in cut(records(chunk, how.text_field), how.tail):
        if isinstance(record, Skipped):
            leave_out(record)
        elif not any(text for text, _ in record.segments):
            leave_out(Skipped(record.place, NO_TEXT, size=record.size))
        elif chat and (reason := chat.refusal(record.turns)):
            leave_out(Skipped(record.place, reason, size=record.size))
        else:
            kept.append(record)
    encoded, cut_prompts = [], 0
    for record, found in zip(kept, _encode_records(kept, tokenizer, chat), strict=True):
        fits = _fitted(found, how, chat) if isinstance(found, Encoded) else found
        if isinstance(fits, str):
            leave_out(Skipped(record.place, fits, size=record.size))
            continue
        encoded.append(fits)
        cut_prompts += fits is not found
        if fits.dropped:
            leave_out(Skipped(record.place, UNKNOWN_CHARACTERS, f", {fits.dropped} bytes", fits.dropped, records=0))
    documents = _join(encoded, tokenizer, marks_documents(how.pack, how.template))
    rest = chunk.input_bytes - sum(counts["bytes"] for counts in left_out.values())
    if rest and not len(documents):  # blank lines and separators, which otherwise count with the documents
        count_left_out(left_out, next(reversed(left_out), "holds no records"), 0, rest)
    return ChunkResult(documents, skipped, left_out, chunk.input_bytes, cut_prompts)


def _texts(record: Record, chat: ChatFormat | None) -> list[str]:
    """The texts of a record, without those of a template."""
    return [text for _, text in record.turns] if chat else [text for text, _ in record.segments]


def _encode_records(kept: list[Record], tokenizer: Tokenizer, chat: ChatFormat | None) -> Iterator[Encoded | str]:
    """Each record as ids, or the reason why it cannot be encoded."""
    rendered = [chat.render(record.turns) for record in kept] if chat else []
    texts = [texts_of(pieces) for pieces in rendered] if chat else [_texts(record, None) for record in kept]
    ids = iter(_encode([text for own in texts for text in own], tokenizer))
    special = chat.marker_ids if chat else [tokenizer.eos_id]
    for i, record in enumerate(kept):
        arrays = [next(ids) for _ in texts[i]]
        scored = [is_scored for _, is_scored in record.segments]
        if not any(map(len, arrays)):
            yield UNKNOWN_TEXT
        elif any((part == id).any() for part in arrays for id in special):  # the document would end there
            yield EOS_INSIDE
        else:
            if chat:
                arrays, scored = chat.assemble(rendered[i], iter(arrays))
                arrays, scored = arrays[:-1], scored[:-1]  # `_join` adds the EOS
            own = _texts(record, chat)
            dropped = sum(map(tokenizer.dropped_bytes, own))
            yield Encoded(record, arrays, scored, sum(len(text.encode()) for text in own) - dropped, dropped)


def _fitted(found: Encoded, how: Encoding, chat: ChatFormat | None) -> Encoded | str:
    """The document, with a shorter prompt where it is longer than a window; or the reason why it does not fit.

    The longest message of the user is cut at its end, as often as needed. The response, the instruction and the system message
    are never cut.
    """
    while how.pack and (excess := sum(map(len, found.arrays)) + 1 - how.pack) > 0:
        turns = list(found.record.turns)
        asked = [i for i, (role, _) in enumerate(turns) if role == "user"] if how.cut and chat else []
        if not asked:
            return TOO_LONG
        longest = max(asked, key=lambda i: len(turns[i][1]))
        turns[longest] = ("user", _shortened(turns[longest][1], excess, chat.tokenizer))
        if not turns[longest][1].strip():
            return TOO_LONG
        (again,) = _encode_records([replace(found.record, turns=tuple(turns))], chat.tokenizer, chat)
        if isinstance(again, str):
            return again
        found = again
    return found


def _shortened(text: str, tokens: int, tokenizer: Tokenizer) -> str:
    """The text without about this many tokens at its end, at least one character."""
    ends = [end for _, end in tokenizer.encoder.encode(text, add_special_tokens=False).offsets]
    return text[: min(ends[max(len(ends) - tokens, 1) - 1], len(text) - 1)] if ends else ""


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


def _join(encoded: list[Encoded], tokenizer: Tokenizer, marks: bool) -> Tokenized:
    """Concatenate the parts of each record, with an EOS after each record. The EOS is scored, as it ends the answer.

    With `marks` the mask shows where documents begin. Such a token is not scored: nothing of the document comes before it.
    """
    eos = np.array([tokenizer.eos_id], tokenizer.dtype)
    arrays, scored, lengths = [], [], []
    for one in encoded:
        arrays += [*one.arrays, eos]
        scored += [*one.scored, True]
        lengths.append(sum(map(len, one.arrays)))
    mask = None
    if marks or not all(scored):
        mask = np.repeat(np.array(scored, np.uint8), [len(array) for array in arrays])
    if marks:
        mask[np.cumsum([0, *(length + 1 for length in lengths)])[:-1]] = BEGINS
    kept = [one.record for one in encoded]
    return Tokenized(
        tokens=np.concatenate(arrays) if arrays else eos[:0],
        lengths=np.array(lengths, np.int64),
        mask=mask,
        ids=[record.id or record.place for record in kept],
        origins=[record.origin for record in kept],
        records=[record.record for record in kept],
        bytes=np.array([one.bytes for one in encoded], np.int64),
        padding=np.zeros(len(encoded), np.int64),
    )

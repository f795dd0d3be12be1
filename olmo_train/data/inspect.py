"""Which documents does a step read, and which steps read a document? Both are arithmetic on a Mixture.

Instances and documents are spans of a source's token stream, so both questions ask which spans overlap. The answers need no log
of what was read, and only numpy.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from olmo_train.data.documents import Document
from olmo_train.data.meta import TOKENIZER_FILE
from olmo_train.data.mixture import Mixture
from olmo_train.data.shards import TokenSource
from olmo_train.errors import ConfigError, check_choice


@dataclass(frozen=True)
class Row:
    """One row of a global batch. Positions are token indices in the source's stream."""

    row: int  # in the global batch
    rank: int
    source: str
    instance: int
    epoch: int  # how often the source was read completely before
    start: int  # of the instance's first token
    end: int  # exclusive; the last token is only a label, and the first input of the next instance (not with order: olmo)
    documents: list[Document]  # that overlap it, in order; of raw files only if the EOS is known
    padding: int | None = None  # tokens that fill the window of a packed source; None: not packed, or documents not looked up


@dataclass(frozen=True)
class Visit:
    """A row of a step that reads tokens of a document."""

    step: int
    row: int  # in the global batch
    instance: int


def rows_per_rank(batch_size: int, world_size: int) -> int:
    """Rows of the global batch per rank. Raises ConfigError when the batch cannot be divided equally."""
    if world_size < 1 or batch_size % world_size:
        raise ConfigError("--world-size", f"{world_size} does not divide the global batch of {batch_size}")
    return batch_size // world_size


def rows_of_step(
    mixture: Mixture,
    step: int,
    world_size: int,
    rank: int | None = None,
    most: int | None = None,
    documents: bool = True,
) -> list[Row]:
    """The rows of a step in the order of the global batch: only those of `rank` if it is set, and at most `most` of them.

    Without `documents`, the documents are not looked up, which takes most of the time. Raises ConfigError.
    """
    batch_size = mixture.batches.at(step)
    rank_size = rows_per_rank(batch_size, world_size)
    if rank is not None and not 0 <= rank < world_size:
        raise ConfigError("--rank", f"{rank} is not a rank; ranks go from 0 to {world_size - 1}")
    first, stop = (0, batch_size) if rank is None else (rank * rank_size, (rank + 1) * rank_size)
    batch = mixture.global_batch(step)[first : stop if most is None else min(stop, first + most)]
    rows: dict[int, Row] = {}
    for i in np.lexsort((batch.instance, batch.source)).tolist():  # in the order of the stream, so that lookups read neighbours
        source, instance, epoch = (int(values[i]) for values in (batch.source, batch.instance, batch.epoch))
        start, end = mixture.span(source, instance)
        opened = mixture.sources[source]
        last = end - 1 if opened.pack else end  # the label of a window's last token is the next window's, and not scored
        found = mixture.marked(source, opened.documents(start, last)) if documents else []
        padding = last - opened.end_with_eos(found[-1]) if found and opened.pack else None
        rows[i] = Row(first + i, (first + i) // rank_size, mixture.names[source], instance, epoch, start, end, found, padding)
    return [rows[i] for i in range(len(batch))]


def find_documents(mixture: Mixture, word: str) -> tuple[int, list[Document]]:
    """(index of the source, documents in order) for `SOURCE:ID` or `SOURCE:@POSITION`, the document that holds this token.

    An id may occur more than once. Raises ConfigError and DataError.
    """
    name, colon, id = word.partition(":")
    if not colon or not id:
        raise ConfigError("--document", f"'{word}' is not SOURCE:ID")
    check_choice("--document", name, mixture.names)
    index = mixture.names.index(name)
    return index, mixture.marked(index, mixture.sources[index].find_documents({id}))


def visits_of(mixture: Mixture, source: int, document: Document, first_step: int, last_step: int) -> list[Visit]:
    """Every row of steps first_step to last_step, both included, that reads tokens of the document or its EOS."""
    stop, visits = mixture.batches.places_before(last_step + 1), []
    for instance in _instances_of(mixture, source, document.start, mixture.sources[source].end_with_eos(document)):
        places = mixture.order.places_of(source, instance, stop)
        visits += [Visit(*mixture.batches.row_of(place), instance) for place in places.tolist()]
    return sorted((v for v in visits if v.step >= first_step), key=lambda visit: (visit.step, visit.row))


def _instances_of(mixture: Mixture, source: int, start: int, stop: int) -> range:
    """The instances that read any token of [start, stop), by bisection: starts and ends of instances are in order."""
    instances = range(mixture.sizes[source])
    packed = mixture.sources[source].pack is not None  # then the last label of an instance is not scored
    low = bisect_right(instances, start, key=lambda instance: mixture.span(source, instance)[1] - packed)
    return range(low, bisect_left(instances, stop, key=lambda instance: mixture.span(source, instance)[0]))


class TextReader:
    """Decodes rows, each with the tokenizer in the folder of its source; None for a source without one."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self._tokenizers: dict[str, object] = {}  # by hash: sources often share one

    def of(self, rows: list[Row], most: int | None = None) -> list[str | None]:
        """The text of each row, or of its first `most` tokens."""
        texts: list[str | None] = [None] * len(rows)
        for name in {row.source for row in rows}:
            source = self.mixture.sources[self.mixture.names.index(name)]
            tokenizer = self._tokenizer(source)
            if tokenizer is not None:
                mine = [i for i, row in enumerate(rows) if row.source == name]
                ids = [self._tokens(source, rows[i], most) for i in mine]
                for i, text in zip(mine, tokenizer.decode_batch(ids, skip_special_tokens=False), strict=True):
                    texts[i] = text
        return texts

    def _tokens(self, source: TokenSource, row: Row, most: int | None) -> list[int]:
        tokens = np.empty(row.end - row.start if most is None else min(most, row.end - row.start), dtype=np.int64)
        source.read(row.start, tokens)
        return tokens.tolist()

    def _tokenizer(self, source: TokenSource):
        if source.folder is None or not (source.folder / TOKENIZER_FILE).is_file():
            return None
        key = source.meta.tokenizer_sha256
        if key not in self._tokenizers:
            import tokenizers

            self._tokenizers[key] = tokenizers.Tokenizer.from_file(str(source.folder / TOKENIZER_FILE))
        return self._tokenizers[key]

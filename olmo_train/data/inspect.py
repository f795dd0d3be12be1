"""Which documents a step reads, and which steps read a document: arithmetic on a Mixture, in both directions.

Instances and documents are both spans of a source's token stream, so both questions ask which spans overlap. They need no
index of what was read, and only numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from olmo_train.data.documents import Document
from olmo_train.data.meta import TOKENIZER_FILE
from olmo_train.data.mixture import Mixture
from olmo_train.data.shards import TokenSource
from olmo_train.errors import ConfigError, check_choice


@dataclass(frozen=True)
class Row:
    """One row of a global batch. Positions are tokens of the source's stream."""

    row: int  # in the global batch
    rank: int
    source: str
    instance: int
    epoch: int  # how often the source has been read through before
    start: int  # of the instance's first token
    end: int  # exclusive: the last token is only predicted, and is the next instance's first (not with order: olmo)
    documents: list[Document]  # that overlap it, in order; those of raw files only where the EOS is known


@dataclass(frozen=True)
class Visit:
    """A row of a step in which tokens of a document are read."""

    step: int
    row: int  # in the global batch
    instance: int


def rows_a_rank(batch_size: int, world_size: int) -> int:
    """Raises ConfigError when the global batch cannot be cut into equal parts."""
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
    """The rows of a step in the order of the global batch: those of `rank` if it is set, and at most `most` of them.

    Without `documents` the documents, which take most of the time, are not looked up. Raises ConfigError.
    """
    batch_size = mixture.batches.at(step)
    rank_size = rows_a_rank(batch_size, world_size)
    if rank is not None and not 0 <= rank < world_size:
        raise ConfigError("--rank", f"{rank} is not one of the {world_size} ranks; use 0 to {world_size - 1}")
    first, stop = (0, batch_size) if rank is None else (rank * rank_size, (rank + 1) * rank_size)
    batch = mixture.global_batch(step)[first : stop if most is None else min(stop, first + most)]
    rows: dict[int, Row] = {}
    for i in np.lexsort((batch.instance, batch.source)).tolist():  # in stream order
        source, instance, epoch = (int(values[i]) for values in (batch.source, batch.instance, batch.epoch))
        start, end = mixture.span(source, instance)
        found = mixture.marked(source, mixture.sources[source].documents(start, end)) if documents else []
        rows[i] = Row(first + i, (first + i) // rank_size, mixture.names[source], instance, epoch, start, end, found)
    return [rows[i] for i in range(len(batch))]


def find_document(mixture: Mixture, word: str) -> tuple[int, Document]:
    """The first of `find_documents`."""
    index, documents = find_documents(mixture, word)
    return index, documents[0]


def find_documents(mixture: Mixture, word: str) -> tuple[int, list[Document]]:
    """(source index, documents in order) of `SOURCE:ID`: an id may occur many times. `SOURCE:@POSITION` is the document that
    holds this token of the stream.

    Raises ConfigError and DataError.
    """
    name, colon, id = word.partition(":")
    if not colon or not id:
        raise ConfigError("--document", f"'{word}' is not SOURCE:ID")
    check_choice("--document", name, mixture.names)
    index = mixture.names.index(name)
    source = mixture.sources[index]
    if not (id.startswith("@") and id[1:].isdigit()):
        return index, mixture.marked(index, sorted(source.find_documents({id}), key=lambda document: document.start))
    return index, mixture.marked(index, [source.document_at(int(id[1:]))])


def visits_of(mixture: Mixture, source: int, document: Document, first_step: int, last_step: int) -> list[Visit]:
    """Every row of steps first_step to last_step, both included, that reads tokens of the document or its EOS."""
    end, visits = mixture.batches.places_before(last_step + 1), []
    for instance in _instances_of_span(mixture, source, document.start, mixture.sources[source].end_with_eos(document)):
        places = mixture.order.places_of(source, instance, end)
        visits += [Visit(*mixture.batches.row_of(place), instance) for place in places.tolist()]
    return sorted((v for v in visits if v.step >= first_step), key=lambda visit: (visit.step, visit.row))


def _instances_of_span(mixture: Mixture, source: int, start: int, stop: int) -> Iterator[int]:
    """The instances that read any token of [start, stop): the inverse of Mixture.span."""
    seq_len = mixture.seq_len
    if not mixture.shifted:  # instance i reads tokens i * seq_len to (i + 1) * seq_len, both included
        yield from range(max(start - 1, 0) // seq_len, min((stop - 1) // seq_len + 1, mixture.sizes[source]))
        return
    before = 0
    for begin, end in zip(mixture.sources[source].starts, mixture.sources[source].starts[1:], strict=False):
        count = int(end - begin) // seq_len
        low, high = max(start - int(begin), 0), min(stop, int(end)) - int(begin)
        if low < high:
            yield from range(before + low // seq_len, before + min((high - 1) // seq_len + 1, count))
        before += count


class TextReader:
    """Decodes spans of sources, each with its own folder's tokenizer; None for a source without one."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self._tokenizers: dict[str, object] = {}  # by the hash of the file: sources often share one

    def of(self, rows: list[Row], most: int | None = None) -> list[str | None]:
        """The text of each row, of its first `most` tokens when given."""
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

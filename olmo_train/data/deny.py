"""Documents excluded from the loss: the words of data.deny, resolved once into spans of the sources' streams.

Whether a token is denied is then a binary search, so the length of the list does not matter. The order of the data is the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from olmo_train.data.documents import Document
from olmo_train.data.shards import TokenSource
from olmo_train.errors import ConfigError, DataError, nearest, reason

KEY = "data.deny"


class Denied:
    """The denied spans of one source."""

    def __init__(self, spans: list[tuple[int, int]]):
        """spans: [start, end) of documents in the source's stream, in any order; a repeated one counts once."""
        self.starts, self.ends = np.array(sorted(set(spans)), dtype=np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self.starts)

    def hide(self, start: int, scored: np.ndarray) -> None:
        """Set `scored`, which describes the tokens [start, start + len(scored)), to 0 where they are denied."""
        low = int(np.searchsorted(self.ends, start, side="right"))
        high = int(np.searchsorted(self.starts, start + len(scored), side="left"))
        for begin, end in zip(self.starts[low:high].tolist(), self.ends[low:high].tolist(), strict=True):
            scored[max(begin - start, 0) : end - start] = 0

    def holds(self, document: Document) -> bool:
        """Whether the document is denied."""
        at = int(np.searchsorted(self.starts, document.start, side="right")) - 1
        return at >= 0 and document.start < int(self.ends[at])


def denied_spans(words: tuple[str, ...], sources: list[TokenSource]) -> list[Denied]:
    """The denied spans of each source: documents with their EOS. An id denies every document that has it.

    Raises ConfigError and DataError.
    """
    named: list[set[str]] = [set() for _ in sources]
    for word, where in _listed(words):
        name, colon, id = word.partition(":")
        if not colon or not id:
            raise ConfigError(where, f"{word!r} is neither SOURCE:ID nor a file; name a document as inspect-data does, or a list")
        names = [source.name for source in sources]
        if name not in names:
            raise ConfigError(where, f"{word!r} is of the source {name!r}, which is not in data.sources; {nearest(name, names)}")
        named[names.index(name)].add(id)
    return [Denied(_spans(source, ids)) for source, ids in zip(sources, named, strict=True)]


def summary(denied: list[Denied], names: list[str]) -> dict[str, object] | None:
    """What a checkpoint stores about the list: documents of each source, and the sha256 of their spans; None if it is empty."""
    if not any(map(len, denied)):
        return None
    counts = {name: len(of) for name, of in zip(names, denied, strict=True) if len(of)}
    digest = hashlib.sha256()
    for name, of in sorted(zip(names, denied, strict=True), key=lambda pair: pair[0]):
        if len(of):
            digest.update(f"{name}\t".encode() + np.stack((of.starts, of.ends)).astype("<i8").tobytes())
    return {"documents": counts, "sha256": digest.hexdigest()}


def _listed(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """(word, where it was found): the words of the key itself, and the lines of the files that it names."""
    found = []
    for word in words:
        if not Path(word).is_file():
            found.append((word, KEY))
            continue
        try:
            lines = Path(word).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise ConfigError(
                KEY, f"the list {word} cannot be read: {reason(problem)}; it is text, one SOURCE:ID a line"
            ) from problem
        found += [(line.strip(), f"{KEY}: {word}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    return found


def _spans(source: TokenSource, ids: set[str]) -> list[tuple[int, int]]:
    try:
        documents = source.find_documents(ids)
    except DataError as problem:
        raise DataError(KEY, f"{problem}; correct the word or leave it out") from problem
    return [(document.start, source.end_with_eos(document)) for document in documents]

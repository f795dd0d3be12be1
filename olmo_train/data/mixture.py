"""The data of a run: open sources and the order of their instances. Needs only numpy, so a run is inspected without torch."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from olmo_train.data.config import DataConfig
from olmo_train.data.deny import denied_spans, summary
from olmo_train.data.documents import Document
from olmo_train.data.order import BatchSizes, Instances, OlmoOrder, PermutedOrder
from olmo_train.data.shards import TokenSource, check_block, open_source
from olmo_train.data.tokenizer import TokenizerRecord, check_same_tokenizer
from olmo_train.errors import ConfigError, DataError
from olmo_train.formats import counted

MOST_PLACES = 2**60  # of a run; more do not fit an int64


class Mixture:
    """Open sources and their order: lists, reads and hashes the global batch of any step."""

    def __init__(self, config: DataConfig, seed: int, global_batch_size: int, seq_len: int, vocab_size: int):
        """Raises ConfigError, and DataError when a source cannot be read or is too small."""
        self.config, self.seq_len = config, seq_len
        self.sources = [open_source(name, source, vocab_size, config.eos_id) for name, source in config.sources.items()]
        self.names = [source.name for source in self.sources]
        self._check_packs()
        self.denied = denied_spans(config.deny, self.sources)
        self.shifted = config.order == "olmo"  # an instance is seq_len tokens, the last of which has no label
        self.eos_id = self._eos_id() if config.document_mask else None  # if set, attention stays within documents
        self.vocab_size = vocab_size
        self._before = [self._instances_before(source) for source in self.sources]
        self.sizes = [before[-1] for before in self._before]  # instances of each source
        self.seed = seed if config.seed is None else config.seed
        self.set_batches(BatchSizes(((1, global_batch_size),)))

    def set_batches(self, batches: BatchSizes) -> None:
        """Change the sizes of the global batches. Raises DataError when a source is too small."""
        self.batches = batches
        if self.shifted:
            self._check_size(sum(self.sizes), max(batches.sizes), ", ".join(self.names))
            self.order = OlmoOrder(self.sizes, batches, self.seed)
        else:
            for name, size in zip(self.names, self.sizes, strict=True):
                self._check_size(size, 1, name)
            stages = [(batches.places_before(step), weights) for step, weights in self.config.mixes()]
            self.order = PermutedOrder(self.names, self.sizes, stages, self.seed)

    def open_validation(self) -> list[TokenSource]:
        """The sources of data.validation. Raises ConfigError and DataError."""
        where, named = "data.validation.{}.path", self.config.validation.items()
        sources = [open_source(name, source, self.vocab_size, self.eos_id, where.format(name)) for name, source in named]
        for source in sources:
            check_pack(source, f"data.validation.{source.name}", self.seq_len, self.config.document_mask)
        return sources

    def check_tokenizers(self, validation: Iterable[TokenSource] = (), *others: TokenizerRecord | None) -> None:
        """Raises DataError when the sources, the validation sources or `others` were made with different tokenizers."""
        records = [source.tokenizer_record(f"data.sources.{source.name}") for source in self.sources]
        records += [source.tokenizer_record(f"data.validation.{source.name}") for source in validation]
        fix = "prepare all data with one tokenizer, or allow it with data.check_tokenizer=false"
        check_same_tokenizer([*records, *others], self.config.check_tokenizer, fix)

    @property
    def fingerprint(self) -> dict[str, str]:
        """{source: hash of its contents}, compared when a run resumes."""
        return {source.name: source.fingerprint for source in self.sources}

    @property
    def denied_summary(self) -> dict[str, object] | None:
        """A summary of what data.deny denies, compared when a run resumes; None if nothing is denied."""
        return summary(self.denied, self.names)

    def marked(self, source: int, documents: list[Document]) -> list[Document]:
        """These documents of a source, with `denied` set on denied ones."""
        return [replace(d, denied=True) if self.denied[source].holds(d) else d for d in documents]

    def global_batch(self, step: int) -> Instances:
        """The instances of step `step`, counted from 1, in the order of rows."""
        return self.order.at(np.arange(self.batches.places_before(step), self.batches.places_before(step + 1)))

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each source read by the end of this step: above 1, its text repeats."""
        visits = self.order.visits_before(self.batches.places_before(step + 1)) / self.sizes
        return dict(zip(self.names, visits.tolist(), strict=True))

    def sample_hash(self, batch: Instances) -> str:
        """sha256 of the batch's sorted (source, instance) pairs, which does not depend on the order of rows."""
        pairs = sorted((self.names[s], int(i)) for s, i in zip(batch.source, batch.instance, strict=True))
        return hashlib.sha256("".join(f"{name}\t{instance}\n" for name, instance in pairs).encode()).hexdigest()

    def places_of_epochs(self, epochs: float) -> int:
        """The first number of places that hold this many passes over the source of the largest weight in data.sources.

        Raises ConfigError when a later stage leaves that source out before.
        """
        weights = [source.weight for source in self.config.sources.values()]
        largest = weights.index(max(weights))
        visits = math.ceil(epochs * self.sizes[largest])
        places = bisect_left(range(MOST_PLACES), visits, key=lambda place: int(self.order.visits_before(place)[largest]))
        if places == MOST_PLACES:
            what = f"{epochs:g} passes over {self.names[largest]} never end, as a stage gives it no weight; set total_steps"
            raise ConfigError("total_epochs", what)
        return places

    def span(self, source: int, instance: int) -> tuple[int, int]:
        """[start, end) of an instance in its source's stream of tokens."""
        if not self.shifted:
            start = instance * self.seq_len
            return start, start + self.seq_len + 1
        before, starts = self._before[source], self.sources[source].starts
        file = bisect_right(before, instance) - 1
        start = int(starts[file]) + (instance - before[file]) * self.seq_len
        return start, start + self.seq_len

    def _instances_before(self, source: TokenSource) -> list[int]:
        """The number of instances before each part of a source that is cut separately, and at the end."""
        if self.shifted:  # OLMo cuts each file separately and drops the remainder
            return np.concatenate(([0], np.cumsum(np.diff(source.starts) // self.seq_len))).tolist()
        return [0, max(source.n_tokens - 1, 0) // self.seq_len]

    def read(self, batch: Instances) -> np.ndarray:
        """Token ids of these instances, (rows, seq_len + 1) int64; seq_len columns with order: olmo."""
        tokens = np.empty((len(batch), self.seq_len + (not self.shifted)), dtype=np.int64)
        for row, (source, instance) in enumerate(zip(batch.source.tolist(), batch.instance.tolist(), strict=True)):
            self.sources[source].read(self.span(source, instance)[0], tokens[row])
        if tokens.max(initial=0) >= self.vocab_size:
            self._refuse_ids(batch, tokens)
        return tokens

    def _refuse_ids(self, batch: Instances, tokens: np.ndarray) -> None:
        row, column = np.argwhere(tokens >= self.vocab_size)[0]
        source = self.sources[batch.source[row]]
        at = self.span(int(batch.source[row]), int(batch.instance[row]))[0] + int(column)
        file = bisect_right(source.starts, at) - 1
        check_block(source, file, at - int(source.starts[file]), tokens[row, column : column + 1], self.vocab_size)

    def read_label_mask(self, batch: Instances) -> np.ndarray | None:
        """1 for each token that is scored as a label, in the shape of `read`, uint8; None if all are."""
        if not any(source.has_label_mask for source in self.sources) and not any(map(len, self.denied)):
            return None
        mask = np.ones((len(batch), self.seq_len + (not self.shifted)), dtype=np.uint8)
        for row, (source, instance) in enumerate(zip(batch.source.tolist(), batch.instance.tolist(), strict=True)):
            start = self.span(source, instance)[0]
            if self.sources[source].has_label_mask:
                self.sources[source].read_label_mask(start, mask[row])
            self.denied[source].hide(start, mask[row])
        return mask

    def _check_packs(self) -> None:
        packed = [source for source in self.sources if source.pack]
        for source in packed:
            check_pack(source, f"data.sources.{source.name}", self.seq_len, self.config.document_mask)
        if packed and len(packed) < len(self.sources):
            other = next(source.name for source in self.sources if not source.pack)
            what = f"mixes {packed[0].name}, which is packed into windows, with {other}, which is not"
            raise ConfigError("data.sources", f"{what}; prepare {other} with --pack {packed[0].pack} too")
        if packed and self.config.order == "olmo":
            raise ConfigError("data.order", "'olmo' reads across the windows of packed sources; use order: permute")

    def _eos_id(self) -> int:
        known = {source.eos_id for source in self.sources}
        if len(known) != 1 or None in known:
            what = f"needs one EOS id, and the sources have {known}; set data.eos_id for raw files"
            raise ConfigError("data.document_mask", what)
        return known.pop()

    def _check_size(self, size: int, needed: int, name: str) -> None:
        if size < needed:
            files = ", ".join(str(file) for file in sorted({s.files[0] for s in self.sources if s.name in name.split(", ")}))
            what = f"{counted(size, 'instance')} of {self.seq_len} tokens in {files}; the run needs at least {needed:,}"
            raise DataError(f"data.sources.{name}", what)


def check_pack(source: TokenSource, name: str, seq_len: int, document_mask: bool) -> None:
    """Raises ConfigError when a packed source does not fit the model's seq_len, or attention would cross its documents.

    `name`: the source, as the user knows it.
    """
    if source.pack not in (None, seq_len):
        what = f"{seq_len} is not the {source.pack} tokens of the windows of {name}"
        raise ConfigError("model.seq_len", f"{what}; set model.seq_len={source.pack}, or prepare it with --pack {seq_len}")
    if source.pack and not document_mask:
        what = f"is false, but {name} is packed: its documents would read each other"
        raise ConfigError("data.document_mask", f"{what}; set data.document_mask=true")

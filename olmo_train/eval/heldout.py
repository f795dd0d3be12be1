"""The loss of a model on held-out sources, beside that of two models without context: unigram and uniform.

Batches and sums are those of the evaluation during a run, so both return the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from olmo_train.data.loader import IGNORE, Batch, validation_batches
from olmo_train.data.mixture import Mixture
from olmo_train.data.shards import TokenSource
from olmo_train.errors import ConfigError, DataError
from olmo_train.eval.perplexity import loss_sums, mixed_counts, unigram_loss
from olmo_train.log.interval import MeanLoss
from olmo_train.model.transformer import Transformer

log = logging.getLogger(__name__)
Watch = Callable[[Iterable, str, int], Iterable]  # (items, label, number of items) -> the items; shows progress


@dataclass(frozen=True)
class HeldOut(MeanLoss):
    """The loss on one source, beside that of two models without context, in nats per token."""

    source: str
    unigram_loss: float | None  # of the model that predicts each token by its frequency in training; None without that data
    uniform_loss: float  # ln(vocab_size)


def measure(
    model: Transformer,
    source: TokenSource,
    rows: int,
    document_mask: bool,
    train_counts: np.ndarray | None,
    watch: Watch = lambda items, *_: items,
) -> HeldOut:
    """Evaluate a model on all tokens of a source, `rows` sequences of seq_len tokens at a time.

    document_mask: attention stays within documents, as in training; always in a packed source, which is read in its windows.
    train_counts: (vocab_size,) occurrences of each id in training. Raises ConfigError when document_mask is set and the EOS of
    the source is not known, or when its windows are longer than the model's seq_len.
    """
    config = model.config
    document_mask, seq_len = document_mask or source.pack is not None, source.pack or config.seq_len
    if seq_len > config.seq_len:
        what = f"is packed into windows of {seq_len} tokens, more than the {config.seq_len} of the model"
        raise ConfigError(source.name, f"{what}; prepare it with --pack {config.seq_len}")
    if document_mask and source.eos_id is None:
        raise ConfigError("data.eos_id", f"is needed for data.document_mask, since {source.name} is made of raw token files")
    seen = np.zeros(config.vocab_size, dtype=np.int64)  # occurrences of each id as a scored label

    def counted(batches: Iterable[Batch]) -> Iterable[Batch]:
        for batch in batches:
            seen[:] += np.bincount(batch.labels[batch.labels != IGNORE].numpy(), minlength=config.vocab_size)
            yield batch

    batches = validation_batches(source, seq_len, rows, 0, 1, source.eos_id if document_mask else None)
    n_batches = -(-(source.n_tokens - 1) // (seq_len * rows))
    loss, tokens = loss_sums(model, watch(counted(batches), source.name, n_batches)).tolist()
    unigram = None if train_counts is None else unigram_loss(train_counts, seen)
    return HeldOut(loss, int(tokens), source.n_bytes, source.name, unigram, math.log(config.vocab_size))


def training_counts(open_mixture: Callable[[], Mixture], step: int) -> np.ndarray | None:
    """Occurrences of each id in the data that a run reads up to `step`, (vocab_size,); None, with a warning, without its data."""
    try:
        mixture = open_mixture()
    except DataError as problem:
        log.warning("no unigram loss, since the training data cannot be read: %s", problem)
        return None
    visits = mixture.order.visits_before(mixture.batches.places_before(max(step, 1) + 1))
    return mixed_counts(mixture.sources, visits, mixture.vocab_size)

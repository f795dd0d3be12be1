"""Loss on held-out tokens, and the unigram model that any language model must beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from olmo_train.data.loader import IGNORE, Batch
from olmo_train.data.shards import TokenSource
from olmo_train.parallel.determinism import loss_terms


@torch.no_grad()
def loss_sums(model: nn.Module, batches: Iterable[Batch], stop: Callable[[], int] = lambda: 0) -> Tensor:
    """(2,) float64 on the model's device: summed loss in nats and scored tokens of the batches.

    `stop` is called between batches; if it returns true, the sums so far are returned.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in batches:
        batch = batch.to(device)
        sums[0] += loss_terms(model(batch.input_ids, batch.labels, batch.documents)).sum()
        sums[1] += (batch.labels != IGNORE).sum()
        if stop():
            break
    model.train(was_training)
    return sums


def token_counts(source: TokenSource, vocab_size: int, most: int = 1 << 28, chunk: int = 1 << 20) -> np.ndarray:
    """How often each id occurs in a source, (vocab_size,) int64; of a source with more than `most` tokens, in a sample
    of `most` tokens from evenly spread chunks."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    every = max(-(-source.n_tokens // most), 1)
    for start in range(0, source.n_tokens, chunk * every):
        tokens = np.empty(min(chunk, source.n_tokens - start), dtype=np.int64)
        source.read(start, tokens)
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def mixed_counts(sources: list[TokenSource], visits: np.ndarray, vocab_size: int) -> np.ndarray:
    """Counts of a training mix, (vocab_size,) float64: each source's, weighted by how often it is read.

    `visits` (sources,) are in any unit. The counts sum to the tokens of all sources, so that adding one smooths them slightly.
    """
    total, shares = sum(source.n_tokens for source in sources), visits / visits.sum()
    mixed = np.zeros(vocab_size)
    for source, share in zip(sources, shares, strict=True):
        counts = token_counts(source, vocab_size)
        mixed += total * share * counts / counts.sum()
    return mixed


def unigram_loss(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Mean loss in nats of the model that knows how often each id occurs in training, plus one, and nothing else."""
    probabilities = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-(validation_counts * np.log(probabilities)).sum() / max(validation_counts.sum(), 1))

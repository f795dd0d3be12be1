"""Continue token sequences with a model: greedily or by sampling, with a cache of keys and values.

All rows of a batch are at the same position. They start with as many tokens as the shortest prompt has; from there on, a row
with prompt tokens left reads its next prompt token, any other row its newest generated token. So prompts of different lengths
share a batch without padding or a mask, and no row's result depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from olmo_train.errors import ConfigError
from olmo_train.model.transformer import KVCache, Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # logits are divided by it; 0: always the likeliest token
    top_k: int | None = None  # choose among this many likeliest tokens
    top_p: float | None = None  # choose among the fewest likeliest tokens whose probabilities reach this sum

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError("temperature", f"must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", f"must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"must be above 0 and at most 1, got {self.top_p}")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seeds: list[int] | None = None,
    eos_id: int | None = None,
    finished: Callable[[list[int]], bool] = lambda new: False,
    cached: bool = True,
) -> list[list[int]]:
    """The new token ids of each prompt, at most max_new_tokens, including the EOS that ends a row.

    Row i samples with seeds[i] (0, 1, 2, ... by default), so its result depends on no other row. It ends at eos_id, when
    `finished(new tokens)` is true, or when the model has read seq_len tokens, the most it was trained on.
    `cached=False` recomputes every position at each step: slow, with the same result. Raises ConfigError on a prompt that is
    empty or longer than seq_len.
    """
    config = model.config
    _check_prompts(prompts, config.seq_len)
    rows = [list(prompt) for prompt in prompts]
    limits = [min(len(prompt) + max_new_tokens, config.seq_len + 1) for prompt in prompts]
    done = [len(row) >= limit for row, limit in zip(rows, limits, strict=True)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(rows))]
    device = next(model.parameters()).device
    cache, position = KVCache() if cached else None, min(map(len, rows), default=0)  # position: tokens read so far
    unread = 0
    while not all(done):
        inputs = torch.tensor([_part(row, unread, position) for row in rows], device=device)  # (B, new)
        logits = model(inputs, cache=cache)[:, -1, : config.vocab_size]  # (B, V), without the padding rows
        waiting = [len(row) == position and not over for row, over in zip(rows, done, strict=True)]
        draws = [torch.rand((), generator=g, dtype=torch.float64) if w else 0.0 for g, w in zip(generators, waiting, strict=True)]
        for i, token in enumerate(choose(logits, sampling, torch.tensor(draws, dtype=torch.float64)).tolist()):
            if waiting[i]:
                rows[i].append(token)
                done[i] = token == eos_id or len(rows[i]) >= limits[i] or finished(rows[i][len(prompts[i]) :])
        unread, position = position if cached else 0, position + 1
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """The next token of each row, (B,) int64, for logits (B, V) and draws (B,) float64 from [0, 1).

    Top-k cuts first, then top-p cuts the rest; then the draw is looked up in the cumulative probabilities.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double() - logits.max(dim=-1, keepdim=True).values  # else a tiny temperature makes them infinite
    probabilities, tokens = (logits / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities[:, sampling.top_k :] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if sampling.top_p is not None:  # keep the token that crosses the sum
        probabilities[probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p] = 0
    reached = probabilities.cumsum(dim=-1)
    place = torch.searchsorted(reached, draws.to(logits.device)[:, None] * reached[:, -1:])
    return tokens.gather(1, place)[:, 0]


def _part(row: list[int], start: int, stop: int) -> list[int]:
    """row[start:stop]; a finished row is padded with zeros, which nothing reads."""
    part = row[start:stop]
    return part + [0] * (stop - start - len(part))


def _check_prompts(prompts: list[list[int]], seq_len: int) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i}", "is empty; begin with the EOS, which comes before every document")
        if len(prompt) > seq_len:
            raise ConfigError(f"prompt {i}", f"has {len(prompt)} tokens, more than the model's seq_len {seq_len}; shorten it")

"""Downstream tasks: which of several texts does the model find most likely after a question?

`score` returns the log-likelihood of every choice, and 0 for the choices of other ranks, so that the sum of the ranks' vectors is
exact. `results_of` computes accuracy and the other metrics from that sum. Batches depend on the task alone and are distributed
over the ranks, so every number of ranks computes the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_train.data.tokenizer import Tokenizer
from olmo_train.eval.tasks import Task, read_task

ROUND = 16  # the length of a batch is a multiple of this number of tokens


@dataclass(frozen=True)
class Row:
    """One choice as tokens: the input of the model, and the targets of its last positions."""

    input_ids: tuple[int, ...]  # context and choice without its last token, at most seq_len, cut on the left
    targets: tuple[int, ...]  # the choice


@dataclass(frozen=True)
class TokenizedTask:
    """A task and the tokens of its choices."""

    task: Task
    rows: tuple[Row, ...]  # the choices of all questions, in order

    @property
    def label(self) -> str:
        """The task's name in the metrics."""
        return self.task.label


def load_task(word: str, tokenizer: Tokenizer, seq_len: int, limit: int | None = None) -> TokenizedTask:
    """Read a task (see read_task) and tokenize it for a model of seq_len. Raises ConfigError and DataError.

    Context and choice are encoded separately, as in OLMo.
    """
    task = read_task(word, limit)
    choices = [choice for question in task.questions for choice in question.choices]
    contexts = tokenizer.encode_batch([choice.context for choice in choices])
    targets = tokenizer.encode_batch([choice.text for choice in choices])
    rows = (_row(c.tolist() or [tokenizer.eos_id], t.tolist(), seq_len) for c, t in zip(contexts, targets, strict=True))
    return TokenizedTask(task, tuple(rows))


def _row(context: list[int], choice: list[int], seq_len: int) -> Row:
    return Row(tuple((context + choice)[:-1][-seq_len:]), tuple(choice[-seq_len:]))


@torch.no_grad()
def score(
    model: nn.Module,
    task: TokenizedTask,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], int] = lambda: 0,
    watch: Callable[[Iterable, str, int], Iterable] = lambda items, *_: items,
) -> Tensor:
    """(rows,) float64 on the model's device: the log-likelihood in nats of each choice; 0 for those of other ranks.

    batch_tokens: most tokens of one forward, padding included. All ranks run the same number of forwards, as sharded models need.
    `stop` is called after each forward; once it is true, scoring ends and the scores are incomplete. `watch(items, label, n)`
    returns the items and may show progress.
    """
    device = next(model.parameters()).device
    scores = torch.zeros(len(task.rows), dtype=torch.float64, device=device)
    batches = _batches(task, batch_tokens)
    was_training = model.training
    model.eval()
    for first in watch(range(0, len(batches), world_size), task.label, -(-len(batches) // world_size)):
        mine = first + rank
        indices = batches[min(mine, len(batches) - 1)]  # past the end, repeat the last batch: sharded models need all ranks
        likelihoods = _likelihoods(model, task, indices, device)
        if mine < len(batches):
            scores[torch.tensor([i for same in indices for i in same], device=device)] = likelihoods
        if stop():
            break
    model.train(was_training)
    return scores


def _batches(task: TokenizedTask, batch_tokens: int) -> list[list[list[int]]]:
    """Batches of groups of rows: rows with the same input form a group, and groups of similar length a batch, longest first."""
    same: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(task.rows):
        same.setdefault(row.input_ids, []).append(i)
    batches: list[list[list[int]]] = []
    width = 0
    for input_ids, indices in sorted(same.items(), key=lambda item: (-len(item[0]), item[1])):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = -(-len(input_ids) // ROUND) * ROUND
        batches[-1].append(indices)
    return batches


def _likelihoods(model: nn.Module, task: TokenizedTask, indices: list[list[int]], device: torch.device) -> Tensor:
    """(choices,) float64, in the order of `indices`; each group shares a line of the batch."""
    inputs = [task.rows[same[0]].input_ids for same in indices]
    width = -(-max(map(len, inputs)) // ROUND) * ROUND
    # Attention is causal, so padding on the right changes nothing.
    input_ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in inputs], device=device)  # (B, T)
    line_of = [line for line, same in enumerate(indices) for _ in same]
    rows = [task.rows[i] for same in indices for i in same]
    scored = [
        (line, place, owner, target)
        for owner, (line, row) in enumerate(zip(line_of, rows, strict=True))
        for place, target in enumerate(row.targets, start=len(row.input_ids) - len(row.targets))
    ]
    lines, places, owners, targets = torch.tensor(scored, device=device).T
    logits = model(input_ids)[lines, places].float()  # (scored tokens, V)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return torch.zeros(len(rows), dtype=torch.float64, device=device).index_add_(0, owners, -losses.double())


@dataclass(frozen=True)
class Downstream:
    """The results of a task. A task without choices has bits per byte only."""

    task: str
    questions: int
    chance: float | None  # accuracy of random guessing
    acc: float | None  # share of questions whose right choice is the most likely
    acc_error: float | None  # standard error of acc
    len_norm: float | None  # the same, with log-likelihoods divided by the characters of the choice
    bits_per_byte: float  # of the right choice: mean over the questions

    def metrics(self) -> dict[str, float]:
        """Under the names of the public OLMo runs."""
        named = {"acc": self.acc, "len_norm": self.len_norm, "bpb": self.bits_per_byte}
        return {f"eval/downstream/{self.task}_{name}": value for name, value in named.items() if value is not None}


def results_of(task: TokenizedTask, scores: list[float]) -> Downstream:
    """Metrics from the log-likelihoods of all choices, (rows,). Lengths do not include the space before a choice."""
    right, right_normed, bits, chance, first = 0, 0, 0.0, 0.0, 0
    for question in task.task.questions:
        texts = [choice.text.removeprefix(" ") for choice in question.choices]
        likelihoods = scores[first : first + len(texts)]
        normed = [value / max(len(text), 1) for value, text in zip(likelihoods, texts, strict=True)]
        right += likelihoods.index(max(likelihoods)) == question.gold
        right_normed += normed.index(max(normed)) == question.gold
        bits -= likelihoods[question.gold] / math.log(2) / max(len(texts[question.gold].encode()), 1)
        chance += 1 / len(texts)
        first += len(texts)
    n = len(task.task.questions)
    if all(len(question.choices) == 1 for question in task.task.questions):
        return Downstream(task.label, n, None, None, None, None, bits / n)
    acc = right / n
    return Downstream(task.label, n, chance / n, acc, math.sqrt(acc * (1 - acc) / n), right_normed / n, bits / n)

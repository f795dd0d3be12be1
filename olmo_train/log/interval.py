"""Metrics of an interval of steps: sums on the device, read once per line of metrics, and pure functions of them."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RESERVED = ("train", "optim", "throughput", "eval", "System")  # the first word of the metrics that a run logs itself


class OwnMetrics:
    """What the body of `for stats in train(config)` adds to the line of a step, until that line is written."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._open = True

    def add(self, step: int, name: str, value: float | Tensor) -> None:
        """See StepStats.log."""
        first, slash, rest = name.partition("/")
        where = f"stats.log: {name}"
        if first in RESERVED or not (first and slash and rest):
            raise ValueError(
                f"{where}: own metrics are called FOLDER/NAME, where FOLDER is none of {', '.join(RESERVED)}: mine/{rest or name}"
            )
        if name in self._values:
            raise ValueError(f"{where}: step {step} has this metric already; log each once a step")
        if not self._open:
            raise ValueError(f"{where}: the line of step {step} is written; log inside the loop, before the next step")
        self._values[name] = float(value)

    def close(self) -> dict[str, float]:
        """All of them; nothing can be added from here on."""
        self._open = False
        return self._values


@dataclass(frozen=True)
class StepStats:
    """Figures of one update. Tensors are on the device: reading one is a host sync."""

    step: int  # counted from 1
    lr: float
    sums: Tensor  # (2, sources) float64: summed loss in nats and counted tokens of the global batch
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1.0 if the update was skipped: not finite, no scored token, or a spike with guards.spike=skip
    losses: Tensor  # (rows of this rank,) fp32: summed loss of each sequence
    spike: Tensor  # 1.0 if loss or norm is far above those of the steps before
    passed_over: bool = False  # on purpose (guards.skip_steps, a rewind): nothing was computed
    norms: tuple[list[str], Tensor] | None = None  # names, and the norm of each gradient, see parallel.clip_gradients
    own: OwnMetrics = field(default_factory=OwnMetrics, repr=False, compare=False)

    def log(self, name: str, value: float | Tensor) -> None:
        """Add a metric to this step's line of metrics.jsonl, W&B and TensorBoard, also where the step is not logged otherwise.

        `name` is FOLDER/NAME, such as mine/entropy. `value` is a number, or a tensor of one element, which is read from the
        device. With several processes the values of rank 0 are written. Raises ValueError for a name that a run uses itself, a
        name that this step has already, or after the next step has begun.
        """
        self.own.add(self.step, name, value)

    @property
    def loss(self) -> Tensor:
        """Mean over the counted tokens (see loss_divisor) of the global batch, in nats; NaN if there are none."""
        return mean_loss(self.sums)

    def metrics(self) -> dict[str, float]:
        """The figures of this one step, by their names in metrics.jsonl. Reads the device."""
        return {"optim/total_grad_norm": self.grad_norm.item(), "optim/learning_rate_group0": self.lr}


def mean_loss(sums: Tensor) -> Tensor:
    """Nats per counted token, from the sums of a global batch (2, sources); NaN without tokens."""
    return sums[0].sum() / sums[1].sum()


def has_no_scored_token(sums: Tensor) -> Tensor:
    """1.0 for a global batch whose labels are all masked, else 0.0, fp32 on the device."""
    return (sums[1].sum() == 0).float()


class Clock:
    """Seconds of training in an interval: wall time minus the time spent on evaluating and saving."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self._started, self._paused = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training since the interval began."""
        return time.perf_counter() - self._started - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside `with` does not count."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - before


class Interval:
    """Sums over the steps since the last line of metrics, on the device until they are read: one host sync a line.

    A skipped step adds no loss. The sums are part of a checkpoint, so that a resumed run logs the same line.
    """

    def __init__(self, sources: int, device: torch.device, state: dict[str, Any] | None = None):
        if state is None or len(state["sums"][0]) != sources:  # a fresh run, or a branch with other sources
            state = {"sums": [[0.0] * sources] * 2, "counts": [0.0] * 4}
        self.sums = torch.tensor(state["sums"], dtype=torch.float64, device=device)  # (2, sources): loss, scored tokens
        counts = state["counts"][:4]  # steps, skipped, clipped, spikes; earlier versions saved another count behind them
        self.counts = torch.tensor(counts, dtype=torch.float64, device=device)
        self.data_wait = 0.0  # seconds
        self.timed_steps = 0  # steps of this process: steps before a resume took none of its time

    def add(self, sums: Tensor, skipped: Tensor, clipped: Tensor, spike: Tensor, data_wait: float) -> None:
        """sums (2, sources) of one step; skipped, clipped and spike are 0.0 or 1.0."""
        self.sums += torch.where(skipped > 0, torch.zeros_like(sums), sums)
        self.counts += torch.stack((torch.ones_like(skipped), skipped, clipped, spike))
        self.data_wait += data_wait
        self.timed_steps += 1

    def metrics(self, names: list[str], bytes_per_token: list[float | None]) -> dict[str, float]:
        """Mean loss over the interval, in total and by source, the fraction of clipped steps, and skipped steps and spikes."""
        (losses, tokens), (steps, skipped, clipped, spikes) = self.sums.tolist(), self.counts.tolist()
        read = list(zip(names, losses, tokens, bytes_per_token, strict=True))
        known = all(ratio is not None for _, _, scored, ratio in read if scored)
        n_bytes = sum(scored * ratio for _, _, scored, ratio in read if scored) if known else None
        metrics = MeanLoss(sum(losses), sum(tokens), n_bytes).metrics("train")
        metrics |= {f"train/source/{name}/CrossEntropyLoss": loss / scored for name, loss, scored, _ in read if scored}
        return metrics | {"optim/clipping_rate": clipped / steps, "skipped": int(skipped), "spike": int(spikes)}

    def state(self) -> dict[str, Any]:
        """Plain numbers for state.json."""
        return {"sums": self.sums.tolist(), "counts": self.counts.tolist()}

    def restart(self) -> None:
        """Begin the next interval."""
        self.sums.zero_()
        self.counts.zero_()
        self.data_wait, self.timed_steps = 0.0, 0


SLOW = 3.0  # times the median of all ranks
LEAST_SLOW = 0.01  # seconds per step above the median; smaller differences are noise


def slow_ranks(own_seconds: list[float]) -> list[int]:
    """The ranks whose own work per step takes more than SLOW times the (lower) median."""
    median = statistics.median_low(own_seconds)
    return [rank for rank, own in enumerate(own_seconds) if own > SLOW * median and own > median + LEAST_SLOW]


@dataclass(frozen=True)
class MeanLoss:
    """A loss summed over scored tokens, in nats, and its mean in the units that are logged."""

    nats: float
    tokens: float  # scored
    n_bytes: float | None  # of the text of these tokens, if known

    @property
    def loss(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss), capped where a float would overflow."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """None if the bytes are not known."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else None

    def metrics(self, prefix: str) -> dict[str, float]:
        """Under the names of the public OLMo runs, which begin with `prefix`."""
        metrics = {f"{prefix}/CrossEntropyLoss": self.loss, f"{prefix}/Perplexity": self.perplexity}
        return metrics if self.bits_per_byte is None else metrics | {f"{prefix}/BitsPerByte": self.bits_per_byte}


def throughput_metrics(
    steps: int,
    seconds: float,
    data_wait: float,
    tokens: int,
    interval_tokens: int,
    flops_per_token: int,
    world_size: int,
    peak_flops: float | None,
) -> dict[str, float]:
    """Throughput over an interval of `steps` and `interval_tokens` that took `seconds`, of which `data_wait` for data.
    `tokens`: all tokens read by its end.

    MFU is omitted if the device's peak is not known: no figure is better than a wrong one.
    """
    rate = interval_tokens / seconds
    metrics = {
        "throughput/total_tokens": tokens,
        "throughput/total_flops": tokens * flops_per_token,
        "throughput/tokens_per_second": rate,
        "throughput/device/tokens_per_second": rate / world_size,
        "throughput/step_seconds": seconds / steps,
        "throughput/data_wait_seconds": data_wait / steps,
    }
    if peak_flops is not None:
        metrics["throughput/mfu"] = rate / world_size * flops_per_token / peak_flops
    return metrics

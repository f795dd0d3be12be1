"""What keeps a run from being poisoned, and what ends it in time: non-finite steps, spikes, stop signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_train.errors import ConfigError, NonFiniteError, check_choice


@dataclass(frozen=True)
class GuardConfig:
    max_skipped: int = 10  # stop after so many skipped steps in a row
    spike: str = "record"  # a step that stands out: record it; skip its update; stop; or rewind to before it, without its batch
    max_rewinds: int = 5  # stop after so many rewinds in a row
    skip_steps: tuple[int, ...] = ()  # steps that are passed over: their batch is read, nothing is computed or changed
    hang_seconds: float = 600  # stop when no step ends for so long; 0: never
    replica_check_steps: int | None = None  # compare replicas bit by bit every so many steps; always before a checkpoint

    def __post_init__(self) -> None:
        check_choice("guards.spike", self.spike, ("record", "skip", "stop", "rewind"))
        for key in ("max_skipped", "max_rewinds"):
            if getattr(self, key) < 1:
                raise ConfigError(f"guards.{key}", f"must be at least 1, got {getattr(self, key)}")
        if any(step < 1 for step in self.skip_steps):
            raise ConfigError("guards.skip_steps", f"are counted from 1, got {list(self.skip_steps)}")
        if self.hang_seconds < 0:
            raise ConfigError("guards.hang_seconds", f"must not be negative, got {self.hang_seconds}")
        if self.replica_check_steps is not None and self.replica_check_steps < 1:
            raise ConfigError("guards.replica_check_steps", f"must be at least 1, got {self.replica_check_steps}")


def skip_if_not_finite(
    optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor, unwanted: Tensor | None = None
) -> Tensor:
    """Make the optimizer's next step an exact no-op when the loss or the gradient norm is not finite, or `unwanted` is 1.0.

    Weights, moments and the count of updates stay as they are. Gives 1.0 or 0.0, fp32, on the device: no host sync.
    All arguments are global, so every rank skips alike.
    """
    skipped = 1.0 - (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()
    if unwanted is not None:
        skipped = torch.maximum(skipped, unwanted)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by torch's fused optimizers
    return skipped


def check_skipped(in_a_row: int, config: GuardConfig, last_good: Path | None, evidence: Path | None = None) -> None:
    """Raise NonFiniteError when too many steps in a row were skipped. `evidence`: the folder of the last one's forensics."""
    if in_a_row >= config.max_skipped:
        raise NonFiniteError(
            "guards.max_skipped",
            f"{in_a_row} steps in a row had a non-finite loss or gradient{' or were spikes' if config.spike == 'skip' else ''} "
            f"and changed nothing; {name_checkpoint(last_good)}; "
            f"{look_at(evidence)}lower optim.peak_lr or look at the data of these steps with inspect-data",
        )


def name_checkpoint(last_good: Path | None) -> str:
    return f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"


def look_at(evidence: Path | None) -> str:
    return f"look at {evidence / 'README.txt'}; " if evidence else ""


class Rewind(Exception):  # not an error: the run goes on from an earlier checkpoint
    pass


def rewound(run_dir: Path) -> list[dict[str, Any]]:
    """The rewinds of a run so far, oldest first, by its events: {"from": the spike, "to": the checkpoint's step,
    "skipped": the steps that are passed over from then on}."""
    file = run_dir / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return [json.loads(line) for line in lines if line.startswith('{"event": "rewind"') and line.endswith("}")]


def plan_rewind(
    spike: int, checkpoint: int, before: list[dict[str, Any]], config: GuardConfig, evidence: Path | None = None
) -> dict[str, Any]:
    """What a rewind from the step `spike` to the step of the newest checkpoint passes over: one step from the spike on,
    and twice as many with every further rewind in a row: to the same checkpoint, or from the step right behind those that
    were passed over. Raises NonFiniteError when there were too many."""
    again, first, last = 0, spike, checkpoint
    for rewind in reversed(before):
        if rewind["to"] != last and rewind["skipped"][-1] + 1 != first:
            break
        again, first, last = again + 1, rewind["from"], rewind["to"]
    if again >= config.max_rewinds:
        raise NonFiniteError(
            "guards.max_rewinds",
            f"step {spike} is a spike after {again} rewinds in a row, the first from step {first}, so its batch is not at fault; "
            f"{look_at(evidence)}lower optim.peak_lr or say guards.spike=record",
        )
    return {"from": spike, "to": checkpoint, "skipped": list(range(spike, spike + 2**again))}


def too_slow_to_stop(step_seconds: float, save_seconds: float) -> str | None:
    """What to do when a step and a save take longer than torchrun waits after a signal; None when they fit, or without
    torchrun. It kills what has not ended by then: 30 s unless its environment says otherwise."""
    patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    needed = step_seconds + save_seconds
    if "TORCHELASTIC_RUN_ID" not in os.environ or needed < patience:
        return None
    return (
        f"a signal to torchrun would lose steps: a step and a save take {needed:.0f} s, and torchrun kills its processes after "
        f"{patience:.0f} s; start it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT={2 * needed:.0f}, or signal the processes themselves"
    )


class StopSignals:
    """Which stop signal this process has got, if any: SIGTERM, SIGINT or SIGUSR1. A second one ends it at once."""

    NAMES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0  # the signal's number, 0 for none

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python takes signals in the main thread only: as a library in a thread, the caller's business
            return
        before = {name: signal.signal(name, self._receive) for name in self.NAMES}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            os._exit(128 + number)  # committed checkpoints are whole at any moment
        self.received = number

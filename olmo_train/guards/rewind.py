"""Rewind a run to its last checkpoint after a spike, without the batches of the spike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olmo_train.errors import NonFiniteError
from olmo_train.formats import counted
from olmo_train.guards.config import GuardConfig
from olmo_train.guards.nonfinite import look_at


class Rewind(Exception):
    """Not an error: the run continues from an earlier checkpoint."""


def plan_rewind(
    spike: int, checkpoint: int, before: list[dict[str, Any]], config: GuardConfig, evidence: Path | None = None
) -> dict[str, Any]:
    """The steps that a rewind from the step `spike` to the newest checkpoint passes over: the spike, and twice as many steps
    with every further rewind in a row. Rewinds are in a row if they go to the same checkpoint, or start at the step right after
    those passed over. Raises NonFiniteError after guards.max_rewinds of them."""
    again, first, last = 0, spike, checkpoint
    for rewind in reversed(before):
        if rewind["to"] != last and rewind["skipped"][-1] + 1 != first:
            break
        again, first, last = again + 1, rewind["from"], rewind["to"]
    if again >= config.max_rewinds:
        raise NonFiniteError(
            "guards.max_rewinds",
            f"step {spike} is a spike after {counted(again, 'rewind')} in a row, the first from step {first}, so its batch "
            f"is not at fault; {look_at(evidence)}lower optim.peak_lr or set guards.spike=record",
        )
    return {"from": spike, "to": checkpoint, "skipped": list(range(spike, spike + 2**again))}

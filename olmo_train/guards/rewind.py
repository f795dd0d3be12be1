"""Rewind a run to its last checkpoint after a spike, without the batches of the spike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olmo_train.errors import NonFiniteError
from olmo_train.guards.config import GuardConfig
from olmo_train.guards.nonfinite import look_at


class Rewind(Exception):  # not an error: the run goes on from an earlier checkpoint
    pass


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

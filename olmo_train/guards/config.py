"""The `guards` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from olmo_train.config import Count, NonNegative


@dataclass(frozen=True)
class GuardConfig:
    max_skipped: Count = 10  # stop after N non-finite steps in a row
    # at a loss spike: log it, skip its update, stop, or rewind to a checkpoint and leave out its batch
    spike: Literal["record", "skip", "stop", "rewind"] = "record"
    max_rewinds: Count = 5  # stop after N rewinds in a row
    skip_steps: tuple[Count, ...] = ()  # steps to pass over: they use up their batch, but compute and change nothing
    hang_seconds: NonNegative = 600  # stop and name the silent rank when no step ends for this long; 0: never
    replica_check_steps: Count | None = None  # compare replicas bit by bit every N steps; always done before a checkpoint

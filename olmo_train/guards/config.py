"""The `guards` section."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_train.errors import ConfigError, check_choice


@dataclass(frozen=True)
class GuardConfig:
    max_skipped: int = 10  # stop after N skipped steps in a row
    spike: str = "record"  # at a loss spike: record, skip its update, stop, or rewind and leave out its batch
    max_rewinds: int = 5  # stop after N rewinds in a row
    skip_steps: tuple[int, ...] = ()  # steps to pass over: they use up their batch, but compute and change nothing
    hang_seconds: float = 600  # stop when no step ends for this long; 0: never
    replica_check_steps: int | None = None  # compare replicas bit by bit every N steps; always before a checkpoint

    def __post_init__(self) -> None:
        check_choice("guards.spike", self.spike, ("record", "skip", "stop", "rewind"))
        for key in ("max_skipped", "max_rewinds"):
            if getattr(self, key) < 1:
                raise ConfigError(f"guards.{key}", f"must be at least 1, got {getattr(self, key)}")
        if any(step < 1 for step in self.skip_steps):
            raise ConfigError("guards.skip_steps", f"steps are counted from 1, got {list(self.skip_steps)}")
        if self.hang_seconds < 0:
            raise ConfigError("guards.hang_seconds", f"must not be negative, got {self.hang_seconds}")
        if self.replica_check_steps is not None and self.replica_check_steps < 1:
            raise ConfigError("guards.replica_check_steps", f"must be at least 1, got {self.replica_check_steps}")

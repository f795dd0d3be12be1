"""The `checkpoint` section."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_train.config import Count


@dataclass(frozen=True)
class CheckpointConfig:
    interval_steps: Count = 1000  # save every N steps, at the end, and on a signal
    keep_last: Count = 3  # keep the N newest checkpoints, besides the permanent ones
    permanent_interval_steps: Count | None = None  # checkpoints at multiples of this are never deleted
    save_steps: tuple[int, ...] = ()  # further steps to save at; these checkpoints are never deleted
    # a metric of data.validation, such as eval/wiki/CrossEntropyLoss: the checkpoint with its smallest value is saved and kept
    keep_best: str | None = None
    async_save: bool = True  # write in the background, from a copy in host memory
    required: bool = True  # a failed save ends the run; false: it logs a warning, and training continues

    def is_due(self, step: int) -> bool:
        return step % self.interval_steps == 0 or self.is_permanent(step)

    def is_permanent(self, step: int) -> bool:
        every = self.permanent_interval_steps
        return step in self.save_steps or (every is not None and step % every == 0)

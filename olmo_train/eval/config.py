"""The `eval` section: when a run evaluates, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_train.errors import ConfigError
from olmo_train.storage import FilePath


@dataclass(frozen=True)
class EvalConfig:
    interval_steps: int = 1000  # evaluate data.validation and the tasks every N steps, and at the end
    downstream: tuple[FilePath, ...] = ()  # tasks: piqa, hellaswag, ..., NAME/VARIANT, or requests.jsonl files
    downstream_limit: int | None = None  # at most N questions of each task, evenly spread; null: all
    tokenizer: FilePath | None = None  # of the tasks: a tokenizer.json or a name; null: the data folder's

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ConfigError("eval.interval_steps", f"must be at least 1, got {self.interval_steps}")
        if self.downstream_limit is not None and self.downstream_limit < 1:
            raise ConfigError("eval.downstream_limit", f"must be at least 1, got {self.downstream_limit}")

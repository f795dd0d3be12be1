"""The `eval` section: when a run evaluates, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_train.config import Count
from olmo_train.storage import FilePath


@dataclass(frozen=True)
class EvalConfig:
    interval_steps: Count = 1000  # evaluate data.validation and the tasks every N steps, and at the end
    stop_after: Count | None = None  # end the run after N evaluations in a row without a better checkpoint.keep_best
    downstream: tuple[FilePath, ...] = ()  # tasks: piqa, hellaswag, ..., NAME/VARIANT, or requests.jsonl files
    downstream_limit: Count | None = None  # at most N questions of each task, evenly spread; null: all
    tokenizer: FilePath | None = None  # tokenizer of the tasks: a tokenizer.json or a name; null: that of the data

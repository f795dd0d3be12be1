"""The reader of a run_dir: attempts, events and logged metrics, of a run that is finished, running or killed. Imports no torch.

The configuration of a run can change at a resume. events.jsonl has the configuration of each attempt and the step it started
from, so every step is looked up in the configuration that made it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train import config as configuration
from olmo_train.errors import ConfigError

if TYPE_CHECKING:
    from olmo_train.data.mixture import Mixture
    from olmo_train.data.order import BatchSizes
    from olmo_train.train_config import TrainConfig

STARTS = ("start", "resume", "branch")  # the events that begin an attempt
LENGTHS = ("total_steps", "total_tokens", "total_epochs")
# The keys that decide which data a step reads.
DATA_KEYS = ("run_dir", "data", "model", "seed", "global_batch_size", "batch_schedule", *LENGTHS)
UNNAMED = "(no run_dir)"
TAIL_BYTES = 1 << 16  # more than a line of metrics


def data_config(values: dict[str, Any]) -> TrainConfig:
    """The configuration that decides which data a step reads, with defaults for everything else. run_dir may be missing, and
    the other sections may have keys of an earlier version that were removed since. Raises ConfigError."""
    from olmo_train.train_config import TrainConfig  # not at the top: `curves` starts without it

    kept = {key: values[key] for key in DATA_KEYS if values.get(key) is not None}
    guards = values.get("guards")
    skip_steps = guards.get("skip_steps") if isinstance(guards, dict) else None
    others = {"run_dir": UNNAMED, "guards": {"skip_steps": skip_steps or ()}, "optim": {"warmup_steps": 0}}
    return configuration.build(TrainConfig, others | kept)


@dataclass(frozen=True)
class Attempt:
    """The steps that one start of the run has made, or, the last one, will make."""

    first_step: int
    config: TrainConfig  # see data_config
    batches: BatchSizes  # of the whole run, as this attempt reads it
    world_size: int | None = None  # None if it is not known
    event: dict[str, Any] = field(default_factory=dict)  # its start, resume or branch, with its complete configuration

    def mixture(self) -> Mixture:
        """The data, opened. Raises DataError."""
        return self.config.mixture(self.batches.changes)


class History:
    """The files of a run_dir, which need not exist. `broken`: {file name: numbers of its broken lines}."""

    def __init__(self, run_dir: Path, config: TrainConfig | None = None):
        """`config`: the data_config of the run with today's configuration, which is used where the data were moved, and for a run
        that has not started."""
        self.run_dir, self.config, self.metrics_file = run_dir, config, run_dir / "metrics.jsonl"
        self.broken: dict[str, list[int]] = {"events.jsonl": [], "metrics.jsonl": []}
        events = json_lines(run_dir / "events.jsonl", self.broken["events.jsonl"], _line_of_run)
        self.events = [event for event in events if "event" in event]

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The events with which the attempts began."""
        return [event for event in self.events if event["event"] in STARTS]

    @property
    def rewinds(self) -> list[dict[str, Any]]:
        """Oldest first, each with "from" (the spike), "to" (the checkpoint's step) and "skipped" (steps passed over since)."""
        return [event for event in self.events if event["event"] == "rewind"]

    @property
    def rewound_steps(self) -> set[int]:
        """The steps that are passed over because of a rewind."""
        return {step for rewind in self.rewinds for step in rewind["skipped"]}

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Oldest first: an attempt that started from step n replaces everything after n. Raises ConfigError."""
        from olmo_train.data.order import BatchSizes

        attempts: list[Attempt] = []
        for event in self.starts:
            if "config" in event and "world_size" in event:
                attempts = [attempt for attempt in attempts if attempt.first_step <= event["step"]]
                config = data_config(configuration.words(event["config"], event.get("started_in")))
                batches = BatchSizes.of(event.get("batches") or config.batches.changes)
                if self.config and _order(self.config) == _order(config):  # the data may have been moved since
                    config = replace(self.config, guards=config.guards)
                attempts.append(Attempt(event["step"] + 1, config, batches, event["world_size"], event))
        if not attempts and self.config:
            attempts = [Attempt(1, self.config, self.config.batches)]
        return attempts

    @cached_property
    def steps(self) -> int:
        """Updates of the whole run, with today's configuration. Opens the data of a run of total_epochs; raises DataError."""
        config, batches = self.config or self.attempts[-1].config, self.attempts[-1].batches
        if config.total_epochs is not None:
            config = config.with_length(config.mixture(batches.changes))
        return config.steps_with(batches)

    def attempt_of(self, step: int) -> Attempt:
        """The attempt that made this step, or would. Raises ConfigError when the run has no such step."""
        if not 1 <= step <= self.steps:
            raise ConfigError("--step", f"must be 1 to {self.steps}, the steps of this run, got {step}")
        return next((attempt for attempt in reversed(self.attempts) if attempt.first_step <= step), self.attempts[0])

    def last_step(self) -> int:
        """The last step that is known to be done, by the newest checkpoint and the last line of metrics. 0 without a run."""
        from olmo_train.checkpoint import folders

        return max(self.last_figures().get("step", 0), *folders.committed(self.run_dir), 0)

    def last_figures(self) -> dict[str, Any]:
        """The newest value of each figure in the last lines of metrics.jsonl, those that TAIL_BYTES hold."""
        figures: dict[str, Any] = {}
        if self.metrics_file.is_file():
            with open(self.metrics_file, "rb") as stream:
                stream.seek(max(self.metrics_file.stat().st_size - TAIL_BYTES, 0))
                for line in filter(None, map(_line_of_run, stream.read().splitlines())):
                    figures |= line
        return figures

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first."""
        return json_lines(self.metrics_file, self.broken["metrics.jsonl"], _line_of_run)

    def line(self, step: int) -> dict[str, Any] | None:
        """The line of metrics of this step; None when it was not logged, or not with its line end."""
        if not self.metrics_file.is_file():
            return None
        with open(self.metrics_file, "rb") as stream:
            stream.seek(self.offset(step))
            text = stream.readline()
        line = _line_of_run(text) if text.endswith(b"\n") else None
        return line if line and line["step"] == step else None

    def offset(self, step: int) -> int:
        """The byte of metrics.jsonl at which the lines of this and later steps begin, by bisection: steps rise, and the file of
        a long run has millions of lines."""
        with open(self.metrics_file, "rb") as stream:

            def line_start(position: int) -> int:
                """Go to the first line that begins at this byte or after it."""
                stream.seek(max(position - 1, 0))
                if position:
                    stream.readline()
                return stream.tell()

            def step_at(position: int) -> float:
                line_start(position)
                line = _line_of_run(stream.readline())
                return line["step"] if line else math.inf

            return line_start(bisect_left(range(self.metrics_file.stat().st_size), step, key=step_at))


def json_object(text: bytes) -> dict[str, Any] | None:
    """None for what is no JSON object."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _line_of_run(text: bytes) -> dict[str, Any] | None:
    """An event or a line of metrics: an object with a step."""
    row = json_object(text)
    return row if row and isinstance(row.get("step"), int) else None


def json_lines(file: Path, broken: list[int], parse: Callable[[bytes], dict | None] = json_object) -> Iterator[dict[str, Any]]:
    """The objects of a file, one on each line; nothing if there is no file.

    A half-written last line, which a killed run leaves, is skipped. The numbers of other lines that `parse` does not accept are
    added to `broken`.
    """
    if not file.is_file():
        return
    with open(file, "rb") as stream:
        for number, text in enumerate(stream, start=1):
            row = parse(text)
            if row is not None:
                yield row
            elif text.endswith(b"\n") and text.strip():
                broken.append(number)


def _order(config: TrainConfig) -> tuple:
    """Equal for two configurations in which every place holds the same instance, wherever the data are."""
    seed = config.seed if config.data.seed is None else config.data.seed
    return seed, config.model.seq_len, config.data.order, tuple(config.data.sources), tuple(map(repr, config.data.mixes()))

"""The history of a run, from its run_dir and without torch: configuration, processes and log line of each step.

The configuration of a run can change at a resume. events.jsonl has the configuration of each attempt and the step it started
from, so every step is looked up in the configuration that made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo_train import config as configuration
from olmo_train.data.config import DataConfig
from olmo_train.data.mixture import Mixture
from olmo_train.data.order import BatchSizes
from olmo_train.errors import ConfigError
from olmo_train.model.config import ModelConfig


@dataclass(frozen=True)
class RunView:
    """The part of a run's configuration that says what each step reads. Names and defaults are those of the whole."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    run_dir: str | None = None
    seed: int = 6198
    global_batch_size: int = 2048
    total_steps: int | None = None
    total_tokens: float | None = None

    @property
    def steps(self) -> int:
        return self.steps_with(BatchSizes(((1, self.global_batch_size),)))

    def steps_with(self, batches: BatchSizes) -> int:
        """Updates of the whole run with these batch sizes."""
        if self.total_steps is not None:
            return self.total_steps
        return batches.steps_for(self.total_tokens or 2e12, self.model.seq_len)

    @property
    def order(self) -> tuple:
        """Equal for two views in which every place holds the same instance, wherever the data lie."""
        seed = self.seed if self.data.seed is None else self.data.seed
        names = tuple(self.data.sources)
        return seed, self.model.seq_len, self.data.order, names, tuple(map(repr, self.data.mixes()))

    def mixture(self, changes: Iterable[Sequence[int]] = ()) -> Mixture:
        """The data, opened, read in batches of these sizes (see BatchSizes). Raises DataError."""
        mixture = Mixture(self.data, self.seed, self.global_batch_size, self.model.seq_len, self.model.vocab_size)
        if changes:
            mixture.set_batches(BatchSizes(tuple(map(tuple, changes))))
        return mixture


@dataclass(frozen=True)
class Attempt:
    """A stretch of steps that one start of the run has made, or, the last one, will make."""

    first_step: int
    view: RunView
    world_size: int | None  # None when it is not known
    skip_steps: tuple[int, ...]  # of guards.skip_steps
    batches: BatchSizes  # of the whole run, as this attempt reads it
    event: dict[str, Any] = field(default_factory=dict)  # its start, resume or branch, with its whole configuration

    def mixture(self) -> Mixture:
        """The data, opened. Raises DataError."""
        return self.view.mixture(self.batches.changes)


class Run:
    """A run_dir, or a configuration that has not been started."""

    def __init__(self, files: list[str | Path], overrides: list[str] = (), run_dir: Path | None = None):
        """Raises ConfigError when the configuration cannot be read."""
        values = configuration.read(files, overrides)
        self.view = configuration.build(RunView, values, partial=True)
        self.skip_steps = _skip_steps(configuration.decoded(values))
        self.run_dir = run_dir or (Path(self.view.run_dir) if self.view.run_dir else None)
        self.events = self._events()
        self.attempts = self._attempts()

    @classmethod
    def of_folder(cls, run_dir: Path, overrides: list[str]) -> Run:
        """The run whose run_dir this is, wherever it has been moved to."""
        return cls([run_dir / "config.yaml"], overrides, run_dir)

    @property
    def steps(self) -> int:
        """Of the whole run, as it is configured now."""
        return self.view.steps_with(self.attempts[-1].batches)

    def attempt_of(self, step: int) -> Attempt:
        """The attempt that made this step, or would. Raises ConfigError on a step that is none."""
        if not 1 <= step <= self.steps:
            raise ConfigError("--step", f"must be 1 to {self.steps}, the steps of this run, got {step}")
        return next((attempt for attempt in reversed(self.attempts) if attempt.first_step <= step), self.attempts[0])

    def last_step(self) -> int:
        """The last step that is known to be done: of the newest checkpoint or the last line of metrics. 0 without a run."""
        if self.run_dir is None:
            return 0
        steps = [int(path.name[5:]) for path in self.run_dir.glob("checkpoints/step-*") if path.name[5:].isdigit()]
        last = _last_line(self.run_dir / "metrics.jsonl")
        return max([*steps, last["step"] if last else 0], default=0)

    def is_passed_over(self, step: int) -> bool:
        """Whether the batch of this step is not trained on: named in guards.skip_steps, or left by a rewind."""
        if step in self.attempt_of(step).skip_steps:
            return True
        return any(event["event"] == "rewind" and step in event["skipped"] for event in self.events)

    def logged(self, step: int) -> dict[str, Any] | None:
        """The line of metrics of this step; None when it was not logged."""
        return _line_of_step(self.run_dir / "metrics.jsonl", step) if self.run_dir else None

    def _events(self) -> list[dict[str, Any]]:
        file = self.run_dir / "events.jsonl" if self.run_dir else None
        lines = file.read_text(encoding="utf-8").splitlines() if file and file.is_file() else ()
        return [event for event in map(_parse, lines) if event and "event" in event]

    def _attempts(self) -> list[Attempt]:
        """From the events, oldest first: an attempt that started from step n replaces everything after n."""
        attempts: list[Attempt] = []
        for event in self.events:
            if "config" in event and "world_size" in event:
                attempts = [attempt for attempt in attempts if attempt.first_step <= event["step"]]
                values = configuration.words(event["config"], event.get("started_in"))
                view = configuration.build(RunView, values, partial=True)
                batches = BatchSizes(tuple(map(tuple, event.get("batches") or [(1, view.global_batch_size)])))
                # The data may have been moved since; where the order is the same, today's paths are taken.
                view = self.view if view.order == self.view.order else view
                skip_steps = _skip_steps(event["config"])
                attempts.append(Attempt(event["step"] + 1, view, event["world_size"], skip_steps, batches, event))
        return attempts or [Attempt(1, self.view, None, self.skip_steps, BatchSizes(((1, self.view.global_batch_size),)))]


def _skip_steps(values: dict[str, Any]) -> tuple[int, ...]:
    return tuple((values.get("guards") or {}).get("skip_steps") or ())


def _parse(line: str | bytes) -> dict[str, Any] | None:
    """A JSON object, or None: the last line of a run that was killed may be half-written."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _last_line(file: Path, tail: int = 1 << 16) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    with open(file, "rb") as stream:
        stream.seek(max(file.stat().st_size - tail, 0))
        lines = stream.read().splitlines()
    return next(filter(None, map(_parse, reversed(lines))), None)


def _line_of_step(file: Path, step: int) -> dict[str, Any] | None:
    """The line of a step in a file whose steps rise, by bisection: a long run's file has millions of lines."""
    if not file.is_file():
        return None
    with open(file, "rb") as stream:

        def line_behind(position: int) -> dict[str, Any] | None:
            """The first line that begins at or behind a byte."""
            stream.seek(max(position - 1, 0))
            if position:
                stream.readline()
            return _parse(stream.readline())

        low, high = 0, file.stat().st_size
        while low < high:
            middle = (low + high) // 2
            line = line_behind(middle)
            if line is None or line["step"] >= step:
                high = middle
            else:
                low = middle + 1
        line = line_behind(low)
    return line if line and line["step"] == step else None


def rewound(run_dir: Path) -> list[dict[str, Any]]:
    """The rewinds of a run so far, oldest first, by its events: {"from": the spike, "to": the checkpoint's step,
    "skipped": the steps that are passed over from then on}."""
    file = run_dir / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return [json.loads(line) for line in lines if line.startswith('{"event": "rewind"') and line.endswith("}")]


def attempts(run_dir: Path) -> int:
    """How often a run was started so far, by its events."""
    file = run_dir / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return sum('"event": "start"' in line or '"event": "resume"' in line or '"event": "branch"' in line for line in lines)


def is_logged(run_dir: Path, step: int) -> bool:
    """Whether metrics.jsonl has the line of this step, complete with its line end."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return any(line.startswith(b'{"step": %d,' % step) and line.endswith(b"}\n") for line in lines)

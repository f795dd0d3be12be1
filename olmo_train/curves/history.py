"""Read what a run has logged, into arrays: `read_run(run_dir)` returns a Run, also for runs of other tools.

Every metric is a separate Series (steps, values), because metrics are logged at different steps. The other x
axes (tokens, FLOPs, time) are functions of the step, found by interpolation between the logged lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olmo_train import config as yaml_config
from olmo_train.errors import ConfigError, DataError
from olmo_train.history import History

# Bookkeeping of a line, no metrics: they are drawn only when --metric asks for them.
BOOKKEEPING = ("step", "time", "attempt", "world_size", "sample_hash", "_step", "_timestamp", "_runtime")
STEP_KEYS = ("step", "_step", "Step", "trainer/global_step")  # the first that a line has; "_step" is W&B's
MAX_STEP = 2**62  # a step beyond it is no step: int64 would not hold it
TIME_KEYS = ("time", "_timestamp")  # unix seconds


@dataclass(frozen=True)
class Series:
    """One metric: steps (n,) int64, strictly increasing, and values (n,) float64, which may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Run:
    name: str
    path: Path
    series: dict[str, Series]  # by metric name
    elapsed: Series | None = None  # seconds of running, without the pauses between attempts
    events: list[dict[str, Any]] = field(default_factory=list)  # each with "event" and "step"
    config: dict[str, Any] = field(default_factory=dict)  # {dotted key: value}
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def last_step(self) -> int:
        return max(int(series.steps[-1]) for series in self.series.values())

    @property
    def ended(self) -> bool:
        if self.total_steps is not None:
            return self.last_step >= self.total_steps
        return any(event["event"] == "finish" and event["step"] >= self.last_step for event in self.events)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; of a run that is given in tokens, as its newest start logged them."""
        total = self.config.get("total_steps")
        if total is None:
            total = next((e["total_steps"] for e in reversed(self.events) if "total_steps" in e), None)
        return total if isinstance(total, int) else None


def read_run(run_dir: Path) -> Run:
    """Read RUN_DIR/metrics.jsonl, events.jsonl and config.yaml; the last two may be absent.

    A half-written last line is passed over, so a run can be read while it writes. Raises DataError when there is no
    metrics.jsonl or it holds no metrics yet.
    """
    history = History(run_dir)
    if not history.metrics_file.is_file():
        raise DataError(run_dir, "holds no metrics.jsonl; name the run_dir of a run that was started")
    columns, clock = collect(history.lines())
    if not columns:
        raise DataError(history.metrics_file, "holds no metrics yet; wait for the first line (--follow waits for you)")
    notes = [note for name, broken in history.broken.items() for note in note_of(run_dir / name, broken)]
    config: dict[str, Any] = {}
    if (run_dir / "config.yaml").is_file():
        try:
            config = yaml_config.flatten(yaml_config.decoded(yaml_config.read([run_dir / "config.yaml"])))
        except ConfigError as problem:
            notes.append(str(problem))
    elapsed = elapsed_seconds(clock, history.starts)
    return Run(run_dir.resolve().name, run_dir, columns, elapsed, history.events, config, notes)


def note_of(file: Path, broken: list[int]) -> list[str]:
    """A note about the broken lines of a file, if it has any."""
    many = "s" * (len(broken) > 1)
    return [f"{file}: {len(broken)} broken line{many} skipped, the first is line {broken[0]}"] if broken else []


def collect(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, Series], list[tuple[int, float, int]]]:
    """Rows to (series by metric, clock). The clock holds (step, unix seconds, attempt) of each row that has them.

    A null is a NaN, a row without a step is passed over, and of two values of a metric at one step the later counts.
    """
    columns: dict[str, tuple[list[int], list[float]]] = {}
    clock = []
    for row in rows:
        step = _first_number(row, STEP_KEYS)
        if step is None or abs(step) > MAX_STEP:
            continue
        for key, value in row.items():
            if value is None:
                value = math.nan
            elif type(value) not in (float, int):  # nor a bool; this line runs for every number of a long run
                continue
            column = columns.get(key)
            if column is None:
                column = columns[key] = ([], [])
            column[0].append(int(step))
            column[1].append(_float(value))
        time = _first_number(row, TIME_KEYS)
        if time is not None:
            attempt = row.get("attempt")
            clock.append((int(step), _float(time), attempt if type(attempt) is int else 0))
    for key in STEP_KEYS:
        columns.pop(key, None)
    series = {name: _series(*column) for name, column in columns.items()}
    return {name: s for name, s in series.items() if not np.isnan(s.values).all()}, clock


def elapsed_seconds(clock: list[tuple[int, float, int]], starts: list[dict[str, Any]] = ()) -> Series | None:
    """Seconds of running at each step. An attempt begins at its event in `starts`, so that pauses do not count."""
    if not clock:
        return None
    start_times = sorted(_float(event["time"]) for event in starts if _is_number(event.get("time")))
    total, steps, values = 0.0, [], []
    previous_time, previous_attempt = None, None
    for step, time, attempt in clock:
        if attempt != previous_attempt:  # count from the newest start before this line, if it lies after the last line
            started = next((start for start in reversed(start_times) if start <= time), time)
            previous_time = started if previous_time is None or started >= previous_time else time
        total += max(0.0, time - previous_time)
        previous_time, previous_attempt = time, attempt
        steps.append(step)
        values.append(total)
    return _series(steps, values)


def _series(steps: list[int], values: list[float]) -> Series:
    steps, values = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
    if len(steps) > 1 and (np.diff(steps) <= 0).any():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(steps[1:] != steps[:-1], True)
        steps, values = steps[last], values[last]
    return Series(steps, values)


def _first_number(row: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    for key in keys:
        if _is_number(row.get(key)) and math.isfinite(_float(row[key])):
            return row[key]
    return None


def _float(value: float) -> float:
    """A number of JSON, which has integers of any length, as a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

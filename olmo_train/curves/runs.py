"""Read what a run has logged, into arrays: `read_run(run_dir)` returns a Run, also for runs of other tools.

Every metric is a separate Series (steps, values), because metrics are logged at different steps. The other x
axes (tokens, FLOPs, time) are functions of the step, found by interpolation between the logged lines.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from olmo_train import config as yaml_config
from olmo_train.errors import ConfigError, DataError, no_run
from olmo_train.formats import counted, short
from olmo_train.history import STARTS, History
from olmo_train.model.cost import count_parameters

# Fields of a line that are no metrics: drawn only when --metric asks for them.
BOOKKEEPING = ("step", "time", "attempt", "world_size", "sample_hash", "_step", "_timestamp", "_runtime")
STEP_KEYS = ("step", "_step", "Step", "trainer/global_step")  # the first that a line has; "_step" is W&B's
MAX_STEP = 2**53  # no step lies beyond it; floats hold every whole number up to it
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
    state: str = ""  # running, finished or stopped; empty where it is not known
    about: dict[str, str] = field(default_factory=dict)  # facts for the heading of a page: {name: text}
    seeds: tuple[Run, ...] = ()  # of which this run is the mean
    spread: dict[str, np.ndarray] = field(default_factory=dict)  # {metric: lowest and highest of the seeds (2, n)} at its steps

    @property
    def last_step(self) -> int:
        return max(int(series.steps[-1]) for series in self.series.values())

    @property
    def ended(self) -> bool:
        if self.seeds:
            return all(run.ended for run in self.seeds)
        if self.total_steps is not None and self.last_step >= self.total_steps:
            return True
        ends = [event for event in self.events if event["event"] in (*STARTS, "finish")]  # eval.stop_after may end a run early
        return bool(ends) and ends[-1]["event"] == "finish" and ends[-1]["step"] >= self.last_step

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, as configured, or for a run of total_tokens as its newest start logged them."""
        known = [self.config.get("total_steps"), *(event.get("total_steps") for event in reversed(self.events))]
        return next((total for total in known if isinstance(total, int)), None)


def read_run(run_dir: Path) -> Run:
    """Read RUN_DIR/metrics.jsonl, events.jsonl and config.yaml; the last two may be absent.

    A half-written last line is skipped, so a run can be read while it writes. Raises DataError when there is no
    metrics.jsonl or it holds no metrics yet.
    """
    history = History(run_dir)
    if not history.metrics_file.is_file():
        raise DataError(run_dir, no_run(run_dir, "holds no metrics.jsonl; name the run_dir of a run that was started"))
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
    run = Run(run_dir.resolve().name, run_dir, columns, elapsed, history.events, config, notes)
    return replace(
        run, state="finished" if run.ended else "running" if _is_running(run_dir) else "stopped", about=_about(history)
    )


def _is_running(run_dir: Path) -> bool:
    """Whether the process that the lock file names is alive; of one on another machine, whether it has logged of late."""
    try:
        holder = re.match(r"process (\d+) on (\S+)", (run_dir / ".lock").read_text(encoding="utf-8"))
        if holder and holder[2] != socket.gethostname():
            return time.time() - (run_dir / "metrics.jsonl").stat().st_mtime < 600
        if holder:
            os.kill(int(holder[1]), 0)  # only asks whether there is such a process, on any system
        return holder is not None
    except PermissionError:  # a process of another user
        return True
    except (OSError, OverflowError):
        return False


def _about(history: History) -> dict[str, str]:
    """Machine, parameters and date, as the newest attempt logged them."""
    facts: dict[str, str] = {}
    start = history.starts[-1] if history.starts else {}
    if isinstance(size := start.get("world_size"), int):
        device, host = start.get("device", "process" if size == 1 else "processes"), start.get("host")
        facts["machine"] = f"{size} × {device}" + (f" on {host}" if host else "")
    with contextlib.suppress(ConfigError):
        if history.attempts:
            facts["parameters"] = short(count_parameters(history.attempts[-1].config.model).total, digits=4)
    if (when := _first_number(start, TIME_KEYS)) is not None:
        facts["date"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
    return facts


def parent_of(run: Run) -> tuple[Path, int] | None:
    """The run_dir that a branch started from, and the step."""
    for event in run.events:
        if event["event"] == "branch" and event.get("checkpoint"):
            return Path(event.get("started_in", "."), event["checkpoint"]).parent.parent, event["step"]
    return None


def join(run: Run, parent: Run, step: int, complete: bool) -> Run:
    """The branch with its parent's curves up to `step` in front: `complete`, or the last point of each, so that lines meet."""
    series = dict(run.series)
    for name in series.keys() & parent.series.keys():
        series[name] = _before(series[name], parent.series[name], step, complete)
    elapsed = run.elapsed
    if elapsed and parent.elapsed and (parent.elapsed.steps <= step).any():
        past = parent.elapsed.values[parent.elapsed.steps <= step][-1]
        elapsed = _before(Series(elapsed.steps, elapsed.values + past), parent.elapsed, step, complete)
    return replace(run, series=series, elapsed=elapsed)


def _before(own: Series, past: Series, step: int, complete: bool) -> Series:
    keep = np.flatnonzero(past.steps < min(step + 1, own.steps[0]))[0 if complete else -1 :]
    return Series(np.append(past.steps[keep], own.steps), np.append(past.values[keep], own.values))


def note_of(file: Path, broken: list[int]) -> list[str]:
    """A note about the broken lines of a file, if it has any."""
    return [f"{file}: {counted(len(broken), 'broken line')} skipped, the first is line {broken[0]}"] if broken else []


def collect(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, Series], list[tuple[float, float, Any]]]:
    """Rows to (series by metric, clock). The clock has (step, unix seconds, attempt) of each row with a time.

    A null is a NaN, a row without a step is skipped, and of two values of a metric at one step the later counts.
    """
    columns: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    clock = []
    for row in rows:
        step, when = _first_number(row, STEP_KEYS), _first_number(row, TIME_KEYS)
        if step is None or abs(step) > MAX_STEP:
            continue
        for key, value in row.items():
            number = _number(value)
            if number is not None:
                steps, values = columns[key]
                steps.append(step)
                values.append(number)
        if when is not None:
            clock.append((step, when, row.get("attempt")))
    for key in STEP_KEYS:
        columns.pop(key, None)
    series = {name: _series(*column) for name, column in columns.items()}
    return {name: s for name, s in series.items() if not np.isnan(s.values).all()}, clock


def elapsed_seconds(clock: list[tuple[float, float, Any]], starts: list[dict[str, Any]] = ()) -> Series | None:
    """Seconds of running at each step. An attempt begins at its event in `starts`, so that pauses do not count."""
    if not clock:
        return None
    start_times = [when for event in starts if (when := _first_number(event, TIME_KEYS)) is not None]
    total, since, values = 0.0, -math.inf, []
    for i, (_, when, attempt) in enumerate(clock):
        if i == 0 or attempt != clock[i - 1][2]:
            since = max((start for start in start_times if since <= start <= when), default=when)
        total += max(0.0, when - since)
        since = when
        values.append(total)
    return _series([step for step, *_ in clock], values)


def _series(steps: list[float], values: list[float]) -> Series:
    ordered = np.asarray(steps, dtype=np.int64)
    order = np.argsort(ordered, kind="stable")
    last = order[np.append(np.diff(ordered[order]) > 0, True)]  # of the values at one step
    return Series(ordered[last], np.asarray(values, dtype=np.float64)[last])


def _first_number(row: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    """The first finite number under one of these keys."""
    numbers = (_number(row[key]) for key in keys if key in row)
    return next((number for number in numbers if number is not None and math.isfinite(number)), None)


def _number(value: Any) -> float | None:
    """A value of JSON, whose whole numbers have any length, as a float; NaN for null, and None for what is no number."""
    if value is None:
        return math.nan
    if type(value) not in (float, int):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf

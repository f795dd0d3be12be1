"""metrics.jsonl and events.jsonl, the record of a run; W&B and TensorBoard mirror it, and may fail without harm.

One JSON object per line, each step once, with floats that read back bit for bit. Metric names are those of the public OLMo
runs, so that curves can be compared.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from olmo_train.errors import DataError, reason
from olmo_train.history import History
from olmo_train.log.config import LogConfig
from olmo_train.log.tensorboard import TensorboardMirror
from olmo_train.log.wandb import WandbMirror, wandb_mode

log = logging.getLogger(__name__)


class JsonLines:
    """A file with one JSON object per line. Lines that cannot be written, as on a full disk, are kept in memory and tried again
    with the next line, so the file is complete as soon as there is room."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115, closed by close()
        self._cut_half_line()
        self._waiting = b""  # not written yet
        self._warned = False

    def append(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self._waiting += json.dumps(_without_infinity(line), allow_nan=False).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as problem:
            if not self._warned:
                log.warning("%s cannot be written for now, its lines are kept in memory: %s", self.path, reason(problem))
            self._warned = True

    def _cut_half_line(self) -> None:
        """Remove an incomplete last line that a killed process left."""
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def sync(self) -> None:
        """Flush the file to the disk."""
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as problem:
            log.warning("%s could not be flushed: %s", self.path, reason(problem))

    def close(self) -> None:
        self._write()
        self._file.close()


class Recorder:
    """Writes metrics.jsonl and events.jsonl of a run_dir and mirrors the metrics. Made on rank 0 only."""

    def __init__(self, run_dir: Path, config: LogConfig, resolved: dict[str, Any], last_step: int):
        """`last_step`: the step that the run resumes from. Lines that an earlier attempt logged after it are removed, as these
        steps are computed again."""
        history = History(run_dir)
        kept = [line for line in history.lines() if line["step"] <= last_step]
        for number in history.broken["metrics.jsonl"]:
            raise DataError(history.metrics_file, f"line {number} is not a line of metrics; remove it, or restore the file")
        if history.metrics_file.exists():
            os.truncate(history.metrics_file, history.offset(last_step + 1))
        self._metrics, self._events = JsonLines(history.metrics_file), JsonLines(run_dir / "events.jsonl")
        self._mirrors = list(_mirrors(run_dir, config, resolved, last_step))
        for mirror in list(self._mirrors):  # send lines that a killed attempt logged but did not mirror
            missing = [line for line in kept if line["step"] > mirror.sent]
            self._try(mirror, last_step, lambda mirror=mirror, missing=missing: self._catch_up(mirror, missing, last_step))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics. A non-finite value is written as null."""
        line = {key: _finite(value) for key, value in {"step": step, "time": time.time(), **metrics}.items()}
        self._metrics.append(line)
        for mirror in list(self._mirrors):
            self._try(mirror, step, lambda mirror=mirror: mirror.log(step, _numbers(line)))

    def settle(self, step: int) -> None:
        """The checkpoint of this step is committed: no resume will repeat the steps up to it."""
        for mirror in list(self._mirrors):
            self._try(mirror, step, lambda mirror=mirror: mirror.settle(step))

    def _catch_up(self, mirror: WandbMirror | TensorboardMirror, lines: list[dict[str, Any]], last_step: int) -> None:
        for line in lines:
            mirror.log(line["step"], _numbers(line))
        mirror.settle(last_step)

    def _try(self, mirror: WandbMirror | TensorboardMirror, step: int, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as problem:
            log.warning("%s failed and is disabled from step %d on: %s", mirror.name, step, problem)
            self._mirrors.remove(mirror)

    def event(self, event: str, step: int, **details: Any) -> None:
        """One line of events.jsonl."""
        line = {"event": event, "step": step, "time": time.time(), **details}
        self._events.append({key: _finite(value) for key, value in line.items()})

    def sync(self) -> None:
        """Make all lines survive a power cut: called before a checkpoint is committed."""
        self._metrics.sync()
        self._events.sync()

    def close(self) -> None:
        for mirror in self._mirrors:
            try:
                mirror.close()
            except Exception as problem:
                log.warning("%s could not be finished: %s", mirror.name, problem)
        self._metrics.close()
        self._events.close()


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}


def _without_infinity(value: Any) -> Any:
    """Infinite numbers of a configuration as `.inf`, as in YAML: JSON has none."""
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    return str(value).replace("inf", ".inf") if isinstance(value, float) and math.isinf(value) else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mirrors(
    run_dir: Path, config: LogConfig, resolved: dict[str, Any], last_step: int
) -> Iterator[WandbMirror | TensorboardMirror]:
    if config.tensorboard:
        yield TensorboardMirror(run_dir, last_step)
    mode = wandb_mode(config.wandb)
    if mode != "disabled":
        try:
            mirror = WandbMirror(run_dir, config.wandb, mode, resolved)
        except Exception as problem:  # training must not depend on it
            log.warning("W&B is disabled: %s", problem)
        else:
            yield mirror

"""Train a configuration with several values of some keys, and compare the losses.

A sweep is a folder of ordinary run_dirs, one for each point: a choice of the values, and a seed. Each point is trained in a
separate process, so one that fails leaves the others alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from olmo_train import config as configuration
from olmo_train.errors import ConfigError, DataError, Stopped
from olmo_train.history import STARTS, History
from olmo_train.parallel.choices import as_decided
from olmo_train.train_config import TrainConfig

STOPPED = Stopped.exit_code
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: tuple[str, ...]  # of the swept keys, as typed
    config: TrainConfig
    words: tuple[str, ...]  # of `olmo-train train`
    parent: Path | None = None  # the run_dir of the point that has the checkpoint to start from

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.run_dir.with_name(f"{self.run_dir.name}.log")

    def is_done(self) -> bool:
        """Whether this run, with this configuration, has finished."""
        ends = [event["event"] for event in History(self.run_dir).events if event["event"] in (*STARTS, "finish")]
        if ends[-1:] != ["finish"]:
            return False
        try:
            saved = configuration.load(TrainConfig, [self.run_dir / "config.yaml"])
        except ConfigError:
            return False
        return replace(saved, run_dir=self.config.run_dir) == as_decided(self.config, saved)


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep. `keys`: the swept keys; `folder`: of all run_dirs."""

    keys: tuple[str, ...]
    folder: Path
    points: tuple[Point, ...]


def plan_sweep(files: Sequence[str], words: Sequence[str], seeds: int = 1) -> Sweep:
    """The points for KEY=V1,V2,... words: all combinations of the values, each with `seeds` seeds, from the configuration's on.
    A value in quotes or brackets is one value. Raises ConfigError when there is nothing to sweep or a point is not valid."""
    swept = {word.partition("=")[0]: values for word in words if len(values := values_of(word)) > 1}
    if not swept:
        raise ConfigError("sweep", "has no key with several values; write KEY=V1,V2, such as optim.peak_lr=1e-3,3e-3")
    for key, values in swept.items():
        if "" in values or len(set(values)) < len(values):
            raise ConfigError(key, f"{','.join(values)} has an empty value, or one twice; write each value once")
        if key == "run_dir":
            raise ConfigError("run_dir", "is the folder of the whole sweep; name one")
    if "seed" in swept and seeds > 1:
        raise ConfigError("--seeds", "goes without seed=V1,V2,...; leave one out")
    fixed = [word for word in words if word.partition("=")[0] not in swept]
    first = configuration.load(TrainConfig, list(files), [*fixed, *(f"{key}={values[0]}" for key, values in swept.items())])
    points = []
    for choice in itertools.product(*swept.values()):
        chosen = [f"{key}={value}" for key, value in zip(swept, choice, strict=True)]
        for seed in range(first.seed, first.seed + seeds):
            own = chosen if "seed" in swept else [*chosen, f"seed={seed}"]
            name = re.sub(r"[^\w.=,+-]", "_", ",".join(own))
            own = [*fixed, *own, f"run_dir={first.run_dir}/{name}"]
            points.append(Point(choice, configuration.load(TrainConfig, list(files), own), (*files, *own)))
    folders = [point.run_dir for point in points]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise ConfigError("run_dir", f"two points would have the same folder, {min(twice)}; put paths into YAML files")
    return Sweep(tuple(swept), Path(first.run_dir), tuple(points))


def values_of(word: str) -> list[str]:
    """The values of a KEY=V1,V2,... word; one for a value in quotes or brackets."""
    value = word.partition("=")[2]
    return [value] if value[:1] in "[{'\"" else [part.strip() for part in value.split(",")]


def script(kind: str, folder: Path, points: Sequence[Point]) -> str:
    """What --print KIND prints: the `commands`, or an array for `slurm`."""
    return commands(points) if kind == "commands" else slurm_array(folder, points)


def commands(points: Sequence[Point]) -> str:
    """A shell command for each point."""
    return "".join(shlex.join(["olmo-train", "train", *point.words]) + "\n" for point in points)


def slurm_array(folder: Path, points: Sequence[Point]) -> str:
    """A script for sbatch: a job array with a task for each point, which is queued again when a signal stops it after saving. A
    point with a parent is trained in its parent's task, after it."""
    tasks = [[point, *(child for child in points if child.parent == point.run_dir)] for point in points if point.parent is None]
    runs = [[f"run {shlex.join(point.words)}" for point in task] for task in tasks]
    bodies = [f"{first} && {{ {'; '.join(after)}; }}" if after else first for first, *after in runs]
    cases = "\n".join(f"{i}) {body} ;;" for i, body in enumerate(bodies, 1))
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={shlex.quote(folder.name)}
#SBATCH --array=1-{len(tasks)}
#SBATCH --ntasks=1
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
status=0
run() {{
  local code=0
  srun olmo-train train "$@" || code=$?
  [ "$code" != {STOPPED} ] || {{ scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; exit {STOPPED}; }}
  [ "$code" = 0 ] || status=$code
  return "$code"
}}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
exit "$status"
"""


# ---- training the points


def start(point: Point, environment: dict[str, str]) -> subprocess.Popen:
    """Train a point in a process that gets no signal of this one's terminal."""
    point.log.parent.mkdir(parents=True, exist_ok=True)
    with open(point.log, "wb") as log:
        words = [sys.executable, "-m", "olmo_train", "train", *point.words]
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)


def visible_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    import torch

    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def train_points(points: Sequence[Point], jobs: int, announce: Callable[[str], None]) -> list[int]:
    """Train all points that are not done, `jobs` at a time, a point with a parent after it. Jobs share the cores, and run on
    separate GPUs while there are enough. Returns the exit code of each. A signal is passed on: the runs save and stop, and no
    other is started; those that were not started have the exit code STOPPED. A point whose parent did not finish has its exit
    code."""
    codes: dict[Path | None, int] = {None: 0}  # as if of the parent of points without one
    waiting, running = list(points), dict[Path, tuple[Point, subprocess.Popen, int]]()
    received: list[int] = []
    environment, gpus = dict(os.environ), visible_gpus() if jobs > 1 else []
    if jobs > 1:  # else each run would take all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for _, process, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def begin(point: Point) -> None:
        if point.is_done():
            announce(f"{point.run_dir}: finished before")
            codes[point.run_dir] = 0
            return
        place = min(set(range(jobs)) - {place for _, _, place in running.values()})
        own = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
        process = start(point, environment | own)
        running[point.run_dir] = point, process, place
        if received:  # the signal came in between
            process.terminate()

    def next_point() -> Point | None:
        """The first one whose parent is done; without those whose parent failed."""
        for point in [point for point in waiting if codes.get(point.parent)]:
            waiting.remove(point)
            codes[point.run_dir] = codes[point.parent]
            announce(f"{point.run_dir}: not started, since {point.parent} has not finished")
        return next((point for point in waiting if point.parent in codes), None)

    def end(point: Point, code: int) -> None:
        del running[point.run_dir]
        codes[point.run_dir] = code
        outcome = {0: "finished", STOPPED: "stopped after saving"}.get(code, f"failed with exit code {code}: {last_line(point)}")
        announce(f"{point.run_dir}: {outcome}")

    with _handling(pass_on):
        while running or (waiting and not received):
            point = next_point()
            if point and not received and len(running) < jobs:
                waiting.remove(point)
                begin(point)
                continue
            time.sleep(POLL_SECONDS)
            for point, process, _ in list(running.values()):
                if (code := process.poll()) is not None:
                    end(point, code)
    return [codes.get(point.run_dir, STOPPED) for point in points]


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def last_line(point: Point) -> str:
    """The last line that the run printed: its error."""
    try:
        lines = point.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ") if lines else ""


def metric_of(config: TrainConfig, name: str | None) -> str:
    """The metric to compare: `name`, else the first loss of data.validation, else the training loss."""
    validation = sorted(config.data.validation)
    return name or (f"eval/{validation[0]}/CrossEntropyLoss" if validation else "train/CrossEntropyLoss")


def result(point: Point, metric: str) -> float:
    """The last value of a metric; of the training loss, which is noisy, the mean over the last tenth of the run. Raises
    DataError when the run has not logged it."""
    from olmo_train.curves.runs import read_run

    series = read_run(point.run_dir).series.get(metric)
    if series is None:
        raise DataError(point.run_dir, f"has not logged {metric}; `olmo-train curves {point.run_dir}` shows what it has")
    if metric.startswith("train/"):
        return float(series.values[series.steps > 0.9 * series.steps[-1]].mean())
    return float(series.values[-1])

"""Compute a step of a finished or running run again, and compare it with what was logged.

`train` itself starts in a temporary folder from the nearest checkpoint before the step, and ends at the step's line of metrics.
Each step is computed with the configuration of the attempt that logged it, as a run may have been lengthened or otherwise changed
since that checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmo_train import config as configuration
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.errors import ConfigError, no_run
from olmo_train.eval.config import EvalConfig
from olmo_train.formats import counted, duration
from olmo_train.guards.forensics import scored_tokens
from olmo_train.history import Attempt, History
from olmo_train.log.config import LogConfig, ProfileConfig, WandbConfig
from olmo_train.log.interval import StepStats
from olmo_train.parallel.kernels import has_cpu_kernels
from olmo_train.train import train
from olmo_train.train_config import TrainConfig

COMPARED = ("train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate_group0", "sample_hash", "skipped")


@dataclass(frozen=True)
class Replay:
    """One logged step, then and now."""

    step: int
    checkpoint: Path | None  # from which it was computed; None: from the initial weights
    logged: dict[str, Any]
    replayed: dict[str, Any]
    sequences: list[tuple[str, int, float]]  # (source, instance, mean loss in nats; 0 without a scored token), largest first

    @property
    def differing(self) -> list[str]:
        """Names of the compared metrics that differ in any bit."""
        return [name for name in COMPARED if self.logged.get(name) != self.replayed.get(name)]


def logged_lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    """{step: line of metrics} of the training lines. Raises ConfigError when the folder is not that of a run."""
    if not (history := History(run_dir)).metrics_file.is_file():
        raise ConfigError(run_dir, no_run(run_dir, "has no metrics.jsonl; name the run_dir of a run"))
    return {line["step"]: line for line in history.lines() if "train/CrossEntropyLoss" in line}


def replay(
    run_dir: Path,
    step: int,
    announce: Callable[[str], None] = lambda text: None,
    watch: Callable[..., Iterable[StepStats]] = lambda steps, what, total: steps,
) -> Replay:
    """Recompute up to the first logged step from `step` on; `announce` gets a line about the work before it starts, and `watch`
    passes the steps on and shows their progress. What `train` prints is about the whole run and is not shown.

    Raises ConfigError when that step was not logged or its configuration is not known, and CheckpointError.
    """
    lines, history = logged_lines(run_dir), History(run_dir)
    target = min((logged for logged in lines if logged >= step), default=None)
    if target is None or step < 1:
        raise ConfigError("--step", f"{step} is after the last logged step, {max(lines, default=0)}")
    if not history.attempts:
        raise ConfigError(run_dir, "has no events.jsonl with the configuration of each attempt; restore it")
    folder = _start(history, target)
    first = 1 + (folders.read_state(folder)["step"] if folder else 0)
    stretches = _stretches(history, first, target)
    announce(_about(lines, folder, first, target, stretches))
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="olmo-train-replay-"))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        newest, done = folder, first - 1
        for number, (config, last, _) in enumerate(stretches):
            place = Path(scratch) / str(number)
            saves = CheckpointConfig(10**9, save_steps=() if last == target else (last,), async_save=False)
            config = dataclasses.replace(config, run_dir=str(place), checkpoint=saves, resume_from=newest and str(newest))
            run = train(config)
            stats = next(stats for stats in watch(run, "replaying", last - done) if stats.step == last)
            run.close()  # logs and saves this step
            newest, done = folders.folder_of(place, last), last
        replayed = logged_lines(place)[target]
    return Replay(target, folder, lines[target], replayed, _sequences(stretches[-1], stats))


def _start(history: History, target: int) -> Path | None:
    """The newest checkpoint before the target; None when the run begins with the initial weights. Raises CheckpointError."""
    earlier = [folder for saved, folder in folders.committed(history.run_dir).items() if saved < target]
    if earlier:
        return folders.resolve(earlier[-1])
    origin = history.attempts[0].event["checkpoint"]  # of a branch: the checkpoint that it started from
    return folders.resolve(Path(origin)) if origin else None


# (configuration, last step, attempt) of consecutive steps
Stretch = tuple[TrainConfig, int, Attempt]


def _stretches(history: History, first: int, target: int) -> list[Stretch]:
    """The configurations with which steps `first` to `target` were made, in order."""
    stretches: list[Stretch] = []
    ends = [attempt.first_step - 1 for attempt in history.attempts[1:]] + [target]
    for attempt, end in zip(history.attempts, ends, strict=True):
        last = min(end, target)
        if last < max(first, attempt.first_step):
            continue
        config = _config_of(history, attempt)
        if stretches and stretches[-1][0] == config:  # resumed without a change
            stretches.pop()
        stretches.append((config, last, attempt))
    return stretches


def _config_of(history: History, attempt: Attempt) -> TrainConfig:
    """The configuration of an attempt, without everything that changes neither what a step computes nor when it is logged.

    The same steps are passed over. Spikes are not handled again, as the logged steps are already without them.
    """
    config = configuration.build(TrainConfig, configuration.words(attempt.event["config"], attempt.event.get("started_in")))
    passed_over = tuple(sorted(history.rewound_steps.union(config.guards.skip_steps)))
    compiled = config.parallel.compile
    if compiled is None and not torch.cuda.is_available():  # recorded by a run on a GPU, or by a version that did not compile
        compiled = False
    parallel = dataclasses.replace(config.parallel, compile=compiled)
    if has_cpu_kernels(None, torch.device("cuda" if torch.cuda.is_available() else "cpu")):  # as in the run
        parallel = dataclasses.replace(parallel, cpu_kernels=attempt.event.get("cpu_kernels", parallel.cpu_kernels))
    return dataclasses.replace(
        config,
        run_dir=str(history.run_dir),
        resume="auto",
        resume_from=None,
        # the base of adapters, which may have moved since the checkpoint
        init_from=config.init_from if attempt.first_step == 1 or config.adapter.is_on else None,
        allow_changes=(),
        parallel=parallel,
        data=dataclasses.replace(config.data, validation={}),
        log=LogConfig(interval_steps=config.log.interval_steps, wandb=WandbConfig(mode="disabled")),
        eval=EvalConfig(interval_steps=10**9),
        profile=ProfileConfig(),
        guards=dataclasses.replace(
            config.guards, spike="skip" if config.guards.spike == "skip" else "record", skip_steps=passed_over
        ),
        checkpoint=CheckpointConfig(interval_steps=10**9),
    )


def _about(lines: dict[int, dict[str, Any]], folder: Path | None, first: int, target: int, stretches: list[Stretch]) -> str:
    """A line with the first step, the number of steps and the estimated time."""
    count = target - first + 1
    text = f"computing {counted(count, 'step')}, {first} to {target}, from {folder or 'the initial weights'}"
    logged = [line.get("throughput/step_seconds") for step, line in lines.items() if first <= step <= target]
    if logged := [seconds for seconds in logged if seconds]:
        text += f": about {duration(count * statistics.mean(logged))} at the speed of the run"
    if len(stretches) > 1:
        ends = ", ".join(str(last) for _, last, _ in stretches[:-1])
        text += f"; the configuration changed after step {ends}, and each step is computed with its own"
    config, _, attempt = stretches[-1]
    if attempt.world_size != 1 and config.determinism != "world":
        size = counted(attempt.world_size, "process")
        text += f"; the run had {size}, and the last digits differ on one, unless determinism is 'world'"
    return text


def _sequences(stretch: Stretch, stats: StepStats) -> list[tuple[str, int, float]]:
    config, step, attempt = stretch
    mixture = config.mixture(attempt.batches.changes)
    batch, scored = mixture.global_batch(step), scored_tokens(mixture, step)
    rows = zip(batch.source.tolist(), batch.instance.tolist(), stats.losses.tolist(), scored, strict=True)
    means = [(mixture.names[source], instance, loss / max(n, 1)) for source, instance, loss, n in rows]
    return sorted(means, key=lambda row: -row[2])

"""Compute a step of a finished or running run again, and compare it with what was logged.

It is the run itself: `train` starts in a temporary folder from the nearest checkpoint before the step and ends at the step's
line of metrics. Each step is computed with the configuration of the attempt that logged it: a run may have been lengthened, or
changed otherwise, since that checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_train import config as configuration
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.errors import ConfigError
from olmo_train.eval.config import EvalConfig
from olmo_train.formats import duration
from olmo_train.guards.config import GuardConfig
from olmo_train.guards.forensics import scored_tokens
from olmo_train.history import Attempt, History
from olmo_train.log.config import LogConfig, ProfileConfig, WandbConfig
from olmo_train.log.interval import StepStats
from olmo_train.train import train
from olmo_train.train_config import TrainConfig

COMPARED = ("train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate_group0", "sample_hash", "skipped")


@dataclass(frozen=True)
class Replay:
    """One logged step, then and now."""

    step: int
    checkpoint: Path | None  # from which it was computed; None: from the first weights
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
        raise ConfigError(run_dir, "has no metrics.jsonl; name the run_dir of a run")
    return {line["step"]: line for line in history.lines() if "train/CrossEntropyLoss" in line}


def replay(run_dir: Path, step: int, announce: Callable[[str], None] = lambda text: None) -> Replay:
    """Recompute up to the first logged step from `step` on; `announce` gets a line about the work before it starts.

    Raises ConfigError when that step was not logged or its configuration is not known, and CheckpointError.
    """
    lines = logged_lines(run_dir)
    target = min((logged for logged in lines if logged >= step), default=None)
    if target is None or step < 1:
        raise ConfigError("--step", f"{step} is not among the {len(lines)} logged steps, up to {max(lines, default=0)}")
    attempts = History(run_dir).attempts
    if not attempts:
        raise ConfigError(run_dir, "has no events.jsonl with the configuration of each attempt; restore it")
    folder = _start(run_dir, attempts[0], target)
    first = 1 + (folders.read_state(folder)["step"] if folder else 0)
    stretches = _stretches(run_dir, attempts, first, target)
    announce(_about(lines, folder, first, target, stretches))
    with tempfile.TemporaryDirectory(prefix="olmo-train-replay-") as scratch:
        newest = folder
        for number, (config, last, _) in enumerate(stretches):
            place = Path(scratch) / str(number)
            saves = CheckpointConfig(10**9, save_steps=() if last == target else (last,), async_save=False)
            config = dataclasses.replace(config, run_dir=str(place), checkpoint=saves, resume_from=newest and str(newest))
            stats = _train_to(config, last)
            newest = folders.folder_of(place, last)
        replayed = logged_lines(place)[target]
    return Replay(target, folder, lines[target], replayed, _sequences(stretches[-1], stats))


def _start(run_dir: Path, first: Attempt, target: int) -> Path | None:
    """The newest checkpoint before the target; None when the run begins with first weights. Raises CheckpointError."""
    earlier = [folder for saved, folder in folders.committed(run_dir).items() if saved < target]
    if earlier:
        return folders.resolve(earlier[-1])
    origin = first.event["checkpoint"]  # of a branch: the checkpoint that it started from
    return folders.resolve(Path(origin)) if origin else None


# (configuration, last step, attempt) of steps in a row
Stretch = tuple[TrainConfig, int, Attempt]


def _stretches(run_dir: Path, attempts: list[Attempt], first: int, target: int) -> list[Stretch]:
    """The configurations with which steps `first` to `target` were made, in order."""
    stretches: list[Stretch] = []
    ends = [attempt.first_step - 1 for attempt in attempts[1:]] + [target]
    for attempt, end in zip(attempts, ends, strict=True):
        last = min(end, target)
        if last < max(first, attempt.first_step):
            continue
        config = _config_of(run_dir, attempt)
        if stretches and stretches[-1][0] == config:  # resumed as it was
            stretches.pop()
        stretches.append((config, last, attempt))
    return stretches


def _config_of(run_dir: Path, attempt: Attempt) -> TrainConfig:
    """The configuration of an attempt without all that does not change what a step computes or when it is logged."""
    config = configuration.build(TrainConfig, configuration.words(attempt.event["config"], attempt.event.get("started_in")))
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        resume="auto",
        resume_from=None,
        init_from=config.init_from if attempt.first_step == 1 else None,
        allow_changes=(),
        data=dataclasses.replace(config.data, validation={}),
        log=LogConfig(interval_steps=config.log.interval_steps, wandb=WandbConfig(mode="disabled")),
        eval=EvalConfig(interval_steps=10**9),
        profile=ProfileConfig(),
        guards=_guards(config.guards, run_dir),
        checkpoint=CheckpointConfig(interval_steps=10**9),
    )


def _about(lines: dict[int, dict[str, Any]], folder: Path | None, first: int, target: int, stretches: list[Stretch]) -> str:
    """A line with the first step, the number of steps and the estimated time."""
    count = target - first + 1
    text = f"computing {count} step{'s' * (count > 1)}, {first} to {target}, from {folder or 'the first weights'}"
    logged = [line.get("throughput/step_seconds") for step, line in lines.items() if first <= step <= target]
    if logged := [seconds for seconds in logged if seconds]:
        text += f": about {duration(math.ceil(count * statistics.mean(logged)))} at the speed of the run"
    if len(stretches) > 1:
        ends = ", ".join(str(last) for _, last, _ in stretches[:-1])
        text += f"; the configuration changed after step {ends}, and each step gets its own"
    config, _, attempt = stretches[-1]
    if attempt.world_size != 1 and config.determinism != "world":
        text += f"; the run had {attempt.world_size} processes, and the last digits differ on one, unless determinism is 'world'"
    return text


def _train_to(config: TrainConfig, step: int) -> StepStats:
    run = train(config)
    stats = next(stats for stats in run if stats.step == step)
    run.close()
    return stats


def _guards(config: GuardConfig, run_dir: Path) -> GuardConfig:
    """Pass over the same steps as the run. Spikes are not handled again: the logged history is already without them."""
    passed_over = History(run_dir).rewound_steps.union(config.skip_steps)
    policy = "skip" if config.spike == "skip" else "record"
    return dataclasses.replace(config, spike=policy, skip_steps=tuple(sorted(passed_over)))


def _sequences(stretch: Stretch, stats: StepStats) -> list[tuple[str, int, float]]:
    config, step, attempt = stretch
    mixture = config.mixture(attempt.batches.changes)
    batch, scored = mixture.global_batch(step), scored_tokens(mixture, step)
    rows = zip(batch.source.tolist(), batch.instance.tolist(), stats.losses.tolist(), scored, strict=True)
    means = [(mixture.names[source], instance, loss / max(n, 1)) for source, instance, loss, n in rows]
    return sorted(means, key=lambda row: -row[2])

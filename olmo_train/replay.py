"""Compute a step of a finished or running run again, and compare it with what was logged.

It is the run itself: `train` starts in a folder that is thrown away, from the nearest checkpoint before the step, and goes
as far as the step's line of metrics.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_train import checkpoint as checkpoints
from olmo_train import config as configuration
from olmo_train.checkpoint import CheckpointConfig
from olmo_train.data.mixture import Mixture
from olmo_train.errors import ConfigError
from olmo_train.guards import GuardConfig, rewound
from olmo_train.metrics import LogConfig, WandbConfig
from olmo_train.recipe import EvalConfig, TrainConfig
from olmo_train.train import train

COMPARED = ("train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate_group0", "sample_hash", "skipped")


@dataclass(frozen=True)
class Replay:
    """One logged step, then and now."""

    step: int
    checkpoint: Path | None  # from which it was computed; None: from the first weights
    logged: dict[str, Any]
    replayed: dict[str, Any]
    sequences: list[tuple[str, int, float]]  # (source, instance, mean loss in nats) of each row, the dearest first

    @property
    def differing(self) -> list[str]:
        """Names of the compared metrics that are not equal to the last bit."""
        return [name for name in COMPARED if self.logged.get(name) != self.replayed.get(name)]


def logged_lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    """{step: line of metrics} of the training lines. Raises ConfigError when there are none."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(run_dir, "has no metrics.jsonl; name the run_dir of a run")
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return {line["step"]: line for line in lines if "train/CrossEntropyLoss" in line}


def replay(run_dir: Path, step: int) -> Replay:
    """Recompute up to the first logged step from `step` on. Raises ConfigError when that step was not logged."""
    lines = logged_lines(run_dir)
    target = min((logged for logged in lines if logged >= step), default=None)
    if target is None or step < 1:
        raise ConfigError("--step", f"{step} is not among the {len(lines)} logged steps, up to {max(lines, default=0)}")
    earlier = [folder for saved, folder in checkpoints.committed(run_dir).items() if saved < step]
    folder = checkpoints.resolve(earlier[-1]) if earlier else None
    config = configuration.build(TrainConfig, _config_of(run_dir, lines[target]["attempt"]))
    with tempfile.TemporaryDirectory(prefix="olmo-train-replay-") as scratch:
        config = dataclasses.replace(
            config,
            run_dir=scratch,
            resume_from=str(folder) if folder else config.resume_from,
            log=LogConfig(interval_steps=config.log.interval_steps, wandb=WandbConfig(mode="disabled")),
            eval=EvalConfig(interval_steps=10**9),
            guards=_guards(config.guards, run_dir),
            checkpoint=CheckpointConfig(interval_steps=10**9),
        )
        run = train(config)
        stats = next(stats for stats in run if stats.step == target)
        run.close()
        replayed = logged_lines(Path(scratch))[target]
    return Replay(target, folder, lines[target], replayed, _sequences(config, target, stats.losses.tolist()))


def _config_of(run_dir: Path, attempt: int) -> dict[str, Any]:
    """The resolved configuration with which an attempt trained: it may differ from the last one, such as in its length."""
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = (json.loads(line) for line in lines if line.endswith("}"))
    event = next(event for event in events if event.get("attempt") == attempt)
    return configuration.words(event["config"], event.get("started_in"))


def _guards(config: GuardConfig, run_dir: Path) -> GuardConfig:
    """What the run passed over is passed over again; a spike that was left does not come back, so none is looked for."""
    left = {step for rewind in rewound(run_dir) for step in rewind["skipped"]}
    policy = "skip" if config.spike == "skip" else "record"
    return dataclasses.replace(config, spike=policy, skip_steps=tuple(sorted(left.union(config.skip_steps))))


def _sequences(config: TrainConfig, step: int, losses: list[float]) -> list[tuple[str, int, float]]:
    shape = config.model
    mixture = Mixture(config.data, config.seed, config.global_batch_size, shape.seq_len, shape.vocab_size)
    batch = mixture.global_batch(step)
    rows = zip(batch.source.tolist(), batch.instance.tolist(), losses, strict=True)
    means = [(mixture.names[source], instance, loss / shape.seq_len) for source, instance, loss in rows]
    return sorted(means, key=lambda row: -row[2])

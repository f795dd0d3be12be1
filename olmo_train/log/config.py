"""The `log` and `profile` sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from olmo_train.config import Count

# Numbers of a line of metrics that describe the attempt: mirrors show them as facts of the run, not as charts.
FACTS = ("attempt", "world_size")


@dataclass(frozen=True)
class ProfileConfig:
    # first step to trace; null: none. Traces are in run_dir/profile, for ui.perfetto.dev, with a table of the ten most
    # expensive operations
    start_step: Count | None = None
    steps: Count = 3  # number of steps to trace


@dataclass(frozen=True)
class WandbConfig:
    """Keys set here take precedence over W&B's environment variables; the variables apply where a key is not set."""

    # auto: as WANDB_DISABLED and WANDB_MODE say; where neither is set, online with an API key and offline without one
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None  # W&B's project; null: WANDB_PROJECT, else olmo-train
    entity: str | None = None  # user or team; null: WANDB_ENTITY
    group: str | None = None  # group of runs; null: WANDB_RUN_GROUP
    name: str | None = None  # name of the run; null: WANDB_NAME, else the last part of run_dir
    tags: tuple[str, ...] = ()  # tags of the run; empty: WANDB_TAGS, separated by commas


@dataclass(frozen=True)
class LogConfig:
    interval_steps: Count = 10  # write a line of metrics.jsonl every N steps
    tensorboard: bool = False  # also write the metrics to run_dir/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)

"""The `log` and `profile` sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from olmo_train.errors import ConfigError, check_choice


@dataclass(frozen=True)
class ProfileConfig:
    start_step: int | None = None  # the first step to trace; null: none
    steps: int = 3  # how many steps to trace

    def __post_init__(self) -> None:
        for key in ("start_step", "steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"profile.{key}", f"must be at least 1, got {value}; steps are counted from 1")


@dataclass(frozen=True)
class WandbConfig:
    """Keys set here take precedence over W&B's environment variables; the variables apply where a key is not set."""

    mode: str = "auto"  # auto: WANDB_DISABLED, WANDB_MODE, else online with a key, else offline; or online, offline, disabled
    project: str | None = None  # null: WANDB_PROJECT, else olmo-train
    entity: str | None = None  # null: WANDB_ENTITY
    group: str | None = None  # null: WANDB_RUN_GROUP
    name: str | None = None  # null: WANDB_NAME, else the run_dir's last part
    tags: tuple[str, ...] = ()  # empty: WANDB_TAGS, separated by commas

    def __post_init__(self) -> None:
        check_choice("log.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass(frozen=True)
class LogConfig:
    interval_steps: int = 10  # write a line of metrics.jsonl every N steps
    tensorboard: bool = False  # mirror the metrics to run_dir/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ConfigError("log.interval_steps", f"must be at least 1, got {self.interval_steps}")

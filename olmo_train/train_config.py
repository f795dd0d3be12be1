"""The configuration of a run, and figures derived from it. The defaults are OLMo-7B's recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.config import build
from olmo_train.data.config import DataConfig
from olmo_train.data.mixture import Mixture
from olmo_train.data.order import BatchSizes
from olmo_train.errors import ConfigError, check_choice
from olmo_train.eval.config import EvalConfig
from olmo_train.guards.config import GuardConfig
from olmo_train.log.config import LogConfig, ProfileConfig
from olmo_train.model.config import ModelConfig
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.schedules import lr_at
from olmo_train.parallel.config import ParallelConfig
from olmo_train.storage import FilePath


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run. The defaults are OLMo-7B's recipe; only run_dir and data.sources must be set."""

    run_dir: FilePath  # the folder for everything that the run writes
    data: DataConfig
    seed: int = 6198  # of the weights, and of the data unless data.seed is set
    total_steps: int | None = None  # updates
    total_tokens: float | None = None  # tokens, instead of total_steps; if neither is set, 2e12 as OLMo
    global_batch_size: int = 2048  # sequences a step, over all processes
    micro_batch_size: int = 4  # sequences in one forward on one process
    loss_divisor: str = "scored_tokens"  # divides loss and gradients; all_tokens: batch x seq_len, unscored tokens too, as OLMo
    determinism: str = "none"  # run: same bits every time; world: also on any number of processes, one sequence at a time
    resume: str = "auto"  # auto: from the newest checkpoint that verifies; strict: refuse when the newest one does not
    resume_from: FilePath | None = None  # start a new run_dir from this checkpoint (of any run): weights, optimizer and step
    init_from: FilePath | None = None  # start a new run_dir with the weights of this checkpoint, at step 0
    allow_changes: tuple[str, ...] = ()  # dotted keys that may differ from the resumed checkpoint
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "micro_batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(key, f"must be at least 1, got {getattr(self, key)}")
        for key, seed in (("seed", self.seed), ("data.seed", self.data.seed)):
            if seed is not None and seed < 0:
                raise ConfigError(key, f"must not be negative, got {seed}")
        check_choice("loss_divisor", self.loss_divisor, ("scored_tokens", "all_tokens"))
        check_choice("determinism", self.determinism, ("none", "run", "world"))
        parallel = self.parallel
        if self.determinism == "world" and (parallel.compile or parallel.float8 or parallel.reduce_dtype != "fp32"):
            raise ConfigError(
                "determinism", "'world' sums gradients in fp64, uncompiled; leave out parallel.compile, float8 and reduce_dtype"
            )
        check_choice("resume", self.resume, ("auto", "strict"))
        if self.resume_from and self.init_from:
            raise ConfigError("init_from", f"{self.init_from} and resume_from {self.resume_from} are both set; leave one out")
        if self.total_steps is not None and self.total_tokens is not None:
            raise ConfigError(
                "total_tokens",
                f"{self.total_tokens:g} and total_steps {self.total_steps} are both set; leave one out",
            )
        if self.steps < 1:
            raise ConfigError("total_steps" if self.total_tokens is None else "total_tokens", "must be at least one step")
        if self.optim.schedule != "constant" and self.optim.warmup_steps >= self.steps and self.total_steps is None:
            raise ConfigError("optim.warmup_steps", f"{self.optim.warmup_steps} fills all {self.steps} steps; use fewer")

    @property
    def steps(self) -> int:
        """Number of updates in the run."""
        return self.steps_with(BatchSizes(((1, self.global_batch_size),)))

    def steps_with(self, batches: BatchSizes) -> int:
        """Number of updates in the run with these batch sizes."""
        if self.total_steps is not None:
            return self.total_steps
        return batches.steps_for(self.total_tokens or 2e12, self.model.seq_len)

    @property
    def warmup_warning(self) -> str | None:
        """A warning if the warmup fills the run. With total_tokens this is an error instead."""
        if self.optim.warmup_steps < self.steps:
            return None
        return f"optim.warmup_steps {self.optim.warmup_steps} fills all {self.steps} steps: the schedule never starts; use fewer"

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.model.seq_len

    def mixture(self, changes: Iterable[Sequence[int]] = ()) -> Mixture:
        """The data, opened, read in batches of these sizes (see BatchSizes), or of global_batch_size. Raises DataError when a
        source cannot be read or is too small."""
        mixture = Mixture(self.data, self.seed, self.global_batch_size, self.model.seq_len, self.model.vocab_size)
        if changes:
            mixture.set_batches(BatchSizes(tuple(map(tuple, changes))))
        return mixture

    def check_world(self, size: int) -> None:
        """Raises ConfigError when the global batch cannot be cut into equal micro-batches for `size` processes."""
        unit = size * self.micro_batch_size
        if self.global_batch_size % unit:
            below = self.global_batch_size // unit * unit
            way_out = f"{below} or {below + unit}" if below else f"{unit}, or a smaller micro_batch_size"
            raise ConfigError(
                "global_batch_size",
                f"{self.global_batch_size} is not a multiple of world_size {size} x micro_batch_size "
                f"{self.micro_batch_size} = {unit}; use {way_out}",
            )


def schedule_warnings(config: TrainConfig, saved: dict[str, Any] | None, batches: BatchSizes, last_step: int) -> list[str]:
    """Warnings about a warmup that fills the run, and about a jump of the learning rate in a run lengthened after `last_step`.

    `saved`: the configuration of the checkpoint that is resumed, if any.
    """
    warnings = [config.warmup_warning] if config.warmup_warning else []
    if saved is not None:
        was = build(TrainConfig, saved)
        steps = was.steps_with(batches)
        before, after = lr_at(last_step, was.optim, steps), lr_at(last_step + 1, config.optim, config.steps)
        if abs(after - lr_at(last_step + 1, was.optim, steps)) > 0.1 * before:
            warnings.append(
                f"the learning rate jumps from {before:.3g} at step {last_step} to {after:.3g} at step {last_step + 1}: the run "
                f"had {steps} steps when it was saved and has {config.steps} now; to keep the schedule: "
                f"optim.schedule_steps={was.optim.schedule_steps or steps} allow_changes=[optim.schedule_steps]"
            )
    return warnings

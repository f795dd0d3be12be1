"""The `optim` section."""

from __future__ import annotations

import math
from dataclasses import dataclass

from olmo_train.errors import ConfigError, check_choice

# Implemented in build.py and schedules.py. The names stand here so that a configuration is checked without importing torch;
# a test holds both sides equal.
OPTIMIZER_NAMES = ("adamw", "muon")
SCHEDULE_NAMES = ("linear", "cosine", "constant", "inverse_sqrt", "wsd")


@dataclass(frozen=True)
class OptimConfig:
    """Defaults are OLMo-7B's (Groeneveld et al. 2024, table 2)."""

    name: str = "adamw"
    peak_lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5  # added to sqrt(v) after bias correction
    weight_decay: float = 0.1  # per step, times the learning rate
    decay_embeddings: bool = False  # OLMo decays Linear weights only; 0424 and later decay embeddings and norms too
    decay_norms: bool = False
    muon_momentum: float = 0.95  # read by muon, for the matrices of the blocks
    max_grad_norm: float = 1.0  # global L2 norm
    grad_clip_warmup_steps: int = 0  # for N steps, counted from the second, the norm may be ...
    grad_clip_warmup_factor: float = 1.0  # ... this many times larger: OLMo-7B 1000 steps and 10.0
    schedule: str = "linear"
    warmup_steps: int = 5000
    warmup_start_ratio: float = 0.1  # the warmup starts at this fraction of the peak, as in OLMo, not at zero
    final_lr_ratio: float = 0.1  # the last learning rate, as a fraction of the peak
    schedule_steps: int | None = None  # the step at which the schedule ends; null: the last step of the run
    decay_steps: int | None = None  # read by wsd: length of the final decay; null: a tenth of the run

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZER_NAMES)
        check_choice("optim.schedule", self.schedule, SCHEDULE_NAMES)
        for key in ("peak_lr", "eps", "weight_decay", "warmup_steps", "warmup_start_ratio", "final_lr_ratio",
                    "grad_clip_warmup_steps", "grad_clip_warmup_factor"):  # fmt: skip
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"optim.{key}", f"must be a finite number and not negative, got {getattr(self, key)}")
        if not self.max_grad_norm > 0:
            raise ConfigError("optim.max_grad_norm", f"must be above 0, got {self.max_grad_norm}; .inf clips nothing")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optim.betas", f"must lie in [0, 1), got {list(self.betas)}")
        if not 0 <= self.muon_momentum < 1:
            raise ConfigError("optim.muon_momentum", f"must lie in [0, 1), got {self.muon_momentum}")
        if self.schedule_steps is not None and self.schedule_steps < max(1, self.warmup_steps):
            raise ConfigError("optim.schedule_steps", f"{self.schedule_steps} is below warmup_steps {self.warmup_steps}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ConfigError("optim.decay_steps", f"is read with schedule: wsd only, not {self.schedule}; leave it out")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ConfigError("optim.decay_steps", f"must be at least 1, got {self.decay_steps}")

"""The optimizer and the learning rate. A schedule is a pure function of the step: lr_at(step, config, total_steps)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from olmo_train.errors import ConfigError, check_choice


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
    max_grad_norm: float = 1.0  # global L2 norm
    schedule: str = "linear"
    warmup_steps: int = 5000
    warmup_start_ratio: float = 0.1  # the warmup starts at this share of the peak, not at zero, as OLMo does
    final_lr_ratio: float = 0.1  # the last learning rate, as a share of the peak
    decay_steps: int | None = None  # read by wsd: the length of the last, falling part; null: a tenth of the run

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZERS)
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        for key in ("peak_lr", "eps", "weight_decay", "warmup_steps", "warmup_start_ratio", "final_lr_ratio"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"optim.{key}", f"must be a finite number and not negative, got {getattr(self, key)}")
        if not self.max_grad_norm > 0:
            raise ConfigError("optim.max_grad_norm", f"must be above 0, got {self.max_grad_norm}; .inf clips nothing")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optim.betas", f"must lie in [0, 1), got {list(self.betas)}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ConfigError("optim.decay_steps", f"is read by schedule: wsd only, and the schedule is {self.schedule}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ConfigError("optim.decay_steps", f"must be at least 1, got {self.decay_steps}")


def lr_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of update `step`, counted from 1.

    Warmup as OLMo (allenai/OLMo, olmo/optim.py): linear from warmup_start_ratio * peak_lr at step 0 to peak_lr at
    warmup_steps; afterwards the schedule, which ends at final_lr_ratio * peak_lr.
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    if step < warmup:
        start = config.warmup_start_ratio * peak
        return start + (peak - start) * step / warmup
    return SCHEDULES[config.schedule](step, config, total_steps)


def linear(step: int, config: OptimConfig, total_steps: int) -> float:
    """A straight line from the peak to the final learning rate; golden values are OLMo's to the last bit."""
    peak, final = config.peak_lr, config.final_lr_ratio * config.peak_lr
    if step >= total_steps:
        return final
    return peak - (peak - final) * ((step - config.warmup_steps) / (total_steps - config.warmup_steps))


def cosine(step: int, config: OptimConfig, total_steps: int) -> float:
    """Half a cosine from the peak to the final learning rate."""
    peak, final = config.peak_lr, config.final_lr_ratio * config.peak_lr
    if step >= total_steps:
        return final
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def constant(step: int, config: OptimConfig, total_steps: int) -> float:
    return config.peak_lr


def inverse_sqrt(step: int, config: OptimConfig, total_steps: int) -> float:
    """peak * sqrt(warmup / step) (Vaswani et al. 2017), not below the final learning rate."""
    warmup = max(config.warmup_steps, 1)
    return max(config.peak_lr * math.sqrt(warmup / max(step, warmup)), config.final_lr_ratio * config.peak_lr)


def wsd(step: int, config: OptimConfig, total_steps: int) -> float:
    """Warmup, stable, decay (Hu et al. 2024): the peak, then a straight line over the last decay_steps."""
    decay = -(-total_steps // 10) if config.decay_steps is None else config.decay_steps
    peak, final = config.peak_lr, config.final_lr_ratio * config.peak_lr
    remaining = max(total_steps - step, 0)
    return peak if remaining >= decay else final + (peak - final) * remaining / decay


SCHEDULES = {"linear": linear, "cosine": cosine, "constant": constant, "inverse_sqrt": inverse_sqrt, "wsd": wsd}


def is_decayed(name: str, config: OptimConfig) -> bool:
    """Whether weight decay applies to the parameter called `name`. A tied head is the embedding, so it is not decayed
    unless embeddings are."""
    if name == "embed.weight":
        return config.decay_embeddings
    if "norm" in name:
        return config.decay_norms
    return True


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over {name: parameter}; weight decay on Linear weights only, unless the configuration says more."""
    return OPTIMIZERS[config.name](parameters, config)


def adamw(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW. Its `found_inf` makes a step an exact no-op without a host sync (see guards.py)."""
    groups = [
        {"params": [p for name, p in parameters.items() if is_decayed(name, config) == decayed],
         "weight_decay": config.weight_decay if decayed else 0.0}
        for decayed in (True, False)
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


OPTIMIZERS = {"adamw": adamw}


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state as before the first step, so that it can be loaded into, and so that memory is
    complete from the start. Weights are left as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    set_lr(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # an exact no-op, which allocates all the same
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr

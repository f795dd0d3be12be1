"""Learning-rate schedules: pure functions of the step, counted from 1."""

from __future__ import annotations

import math

from olmo_train.optim.config import OptimConfig


def lr_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of update `step`, counted from 1.

    Warmup as OLMo (allenai/OLMo, olmo/optim.py): linear from warmup_start_ratio * peak_lr at step 0 to peak_lr at
    warmup_steps; afterwards the schedule, which ends at final_lr_ratio * peak_lr. Both are multiplied by the factor of
    lr_batch_scaling. `config` has its lengths in steps; see TrainConfig.in_steps.
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    factor = next((factor for first, factor in reversed(config.lr_factors) if first <= step), 1.0)
    if step < warmup:
        start = config.warmup_start_ratio * peak
        return (start + (peak - start) * step / warmup) * factor
    return SCHEDULES[config.schedule](step, config, config.schedule_steps or total_steps) * factor


def max_grad_norm_at(step: int, config: OptimConfig) -> float:
    """The norm that update `step` is clipped to. OLMo sets the norm after clipping, so there, and here, the first update is
    clipped to max_grad_norm and the warmup ends one step late."""
    return config.max_grad_norm * (config.grad_clip_warmup_factor if 1 < step <= config.grad_clip_warmup_steps + 1 else 1.0)


def linear(step: int, config: OptimConfig, total_steps: int) -> float:
    """A straight line from the peak to the final learning rate, equal to OLMo's to the last bit."""
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
    """The peak to the end of the run; final_lr_ratio is not read."""
    return config.peak_lr


def inverse_sqrt(step: int, config: OptimConfig, total_steps: int) -> float:
    """peak * sqrt(warmup / step) (Vaswani et al. 2017), not below the final learning rate."""
    warmup = max(config.warmup_steps, 1)
    return max(config.peak_lr * math.sqrt(warmup / max(step, warmup)), config.final_lr_ratio * config.peak_lr)


def wsd(step: int, config: OptimConfig, total_steps: int) -> float:
    """Warmup, stable, decay (Hu et al. 2024): the peak, then a decay of decay_shape over the last decay_steps."""
    decay = -(-total_steps // 10) if config.decay_steps is None else config.decay_steps
    peak, final = config.peak_lr, config.final_lr_ratio * config.peak_lr
    remaining = max(total_steps - step, 0)
    return peak if remaining >= decay else final + DECAY_SHAPES[config.decay_shape](peak - final, remaining, decay)


def linear_decay(height: float, remaining: int, decay: int) -> float:
    """`height` at the start of a decay of `decay` steps, and 0 at its end, when none are `remaining`."""
    return height * remaining / decay


def one_minus_sqrt_decay(height: float, remaining: int, decay: int) -> float:
    """The same by 1 - sqrt(share of the decay that is done) (Hägele et al. 2024, section 3)."""
    return height * (1 - math.sqrt((decay - remaining) / decay))


SCHEDULES = {"linear": linear, "cosine": cosine, "constant": constant, "inverse_sqrt": inverse_sqrt, "wsd": wsd}
DECAY_SHAPES = {"linear": linear_decay, "1-sqrt": one_minus_sqrt_decay}

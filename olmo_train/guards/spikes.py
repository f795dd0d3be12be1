"""Spike detection: steps whose loss or gradient norm is far above those of the last steps.

A step is compared with the median of the last few steps, or of all in the window where that is lower, in units of the noise from
one step to the next. These are medians, which a spike hardly moves, and differences between neighbours leave out the trend: a
fast falling loss is not taken for noise.
The state is on the device, so judging a step costs no host sync, and it is saved in checkpoints.

tests/benchmarks/spikes.py measures the error rates, which docs/robustness.md has. The constants were chosen on its first 19 runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # steps whose noise is measured: a median over fewer is itself noisy, and over more it lags behind the training
RECENT = 16  # steps whose median is the level: few, so that it follows a loss that falls fast at the start of a run
LEAST = 32  # finite steps needed before any step can be a spike: with fewer, noise and level are both uncertain
# A spike is this many standard deviations of the noise above the level: of the loss, and of the log of the gradient norm. The
# loss of healthy steps reached 4.2, that of random tokens had 6.2 or more; the norm of one repeated token had 14.6 or more.
SIGMAS = (5.5, 12.0)
# A smaller rise is no spike: 0.1 nats, as a large batch has next to no noise, and a norm six times the level, as norms have heavy
# tails: batches of healthy text reached 4.6 times the level, and one repeated token had 7.7 times or more.
LEAST_RISE = (0.1, math.log(6))


class SpikeDetector:
    """Compares each step's loss and gradient norm with those of the last WINDOW steps."""

    def __init__(self, device: torch.device, state: dict[str, Any] | None = None):
        state = state or {"window": [[None] * WINDOW] * 2, "seen": 0}
        rows = [[float("nan") if value is None else value for value in row] for row in state["window"]]
        self.window = torch.tensor(rows, dtype=torch.float64, device=device)  # (2, WINDOW), a ring: loss, log of the norm
        self.seen = torch.tensor(state["seen"], device=device)  # finite steps so far; the next place is seen % WINDOW
        self._recent = torch.arange(-RECENT, 0, device=device)
        self._sigmas, self._least_rise = torch.tensor((SIGMAS, LEAST_RISE), dtype=torch.float64, device=device)  # (2,) each

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if this step is a spike, else 0.0, fp32 on the device; adds the step to the window. Ignores a non-finite step."""
        values = torch.stack((loss.double(), grad_norm.double().log()))
        finite = torch.isfinite(values).all()
        spike = (values > self.limit()).any() & finite & (self.seen >= LEAST)
        place = (self.seen % WINDOW).expand(2, 1)
        kept = torch.where(finite, values[:, None], self.window.gather(1, place))
        self.window.scatter_(1, place, kept)
        self.seen += finite
        return spike.float()

    def limit(self) -> Tensor:
        """(2,) loss and log of the gradient norm above which the next step is a spike.

        For normal noise the median of |difference of two neighbours| is sqrt(2) / 1.4826 standard deviations.
        """
        recent = nanmedian(self.window[:, (self.seen + self._recent) % WINDOW])
        level = torch.minimum(recent, nanmedian(self.window))  # a slow rise does not lift its own level
        noise = nanmedian((self.window - self.window.roll(1, dims=1)).abs()) * (1.4826 / 2**0.5)
        return level + torch.maximum(self._sigmas * noise, self._least_rise)

    def state(self) -> dict[str, Any]:
        """Plain numbers for state.json, null for empty places of the window."""
        rows = [[None if value != value else value for value in row] for row in self.window.tolist()]
        return {"window": rows, "seen": int(self.seen)}


def nanmedian(rows: Tensor) -> Tensor:
    """The median of each row of (n, m) without its NaNs, (n,); the lower one of two, NaN for a row of NaNs only.

    The values of torch.nanmedian(dim=1), which has no deterministic kernel on a GPU, as it also returns a place.
    """
    ordered = rows.sort(dim=1).values  # NaN last
    middle = ((~rows.isnan()).sum(dim=1, keepdim=True) - 1).clamp(min=0) // 2
    return ordered.gather(1, middle)[:, 0]

"""Spike detection: steps whose loss or gradient norm is far above those of the last steps.

The threshold is robust: it comes from the median and the median absolute deviation of the last steps, which a spike hardly
moves. The state is on the device, so judging a step costs no host sync, and it is saved in checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # a step is compared with this many steps before it
LEAST = 32  # finite steps needed before any step can be a spike
SIGMAS = 6.0  # a spike is this many robust standard deviations above the median
FLOOR = 0.01  # least standard deviation, so that noise on a plateau is no spike; loss in nats, log of the gradient norm


class SpikeDetector:
    """Compares each step's loss and gradient norm with those of the last WINDOW steps."""

    def __init__(self, device: torch.device, state: dict[str, Any] | None = None):
        state = state or {"window": [[None] * WINDOW] * 2, "seen": 0}
        rows = [[float("nan") if value is None else value for value in row] for row in state["window"]]
        self.window = torch.tensor(rows, dtype=torch.float64, device=device)  # (2, WINDOW): loss, log of the norm
        self.seen = torch.tensor(state["seen"], device=device)  # finite steps so far

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if this step is a spike, else 0.0, fp32 on the device; adds the step to the window. Ignores a non-finite step.
        The standard deviation is 1.4826 x MAD, as for a normal distribution."""
        values = torch.stack((loss.double(), grad_norm.double().log()))
        finite = torch.isfinite(values).all()
        median = self.window.nanmedian(dim=1, keepdim=True).values
        deviation = (self.window - median).abs().nanmedian(dim=1).values
        limit = median[:, 0] + SIGMAS * (1.4826 * deviation).clamp(min=FLOOR)
        spike = (values > limit).any() & finite & (self.seen >= LEAST)
        place = (self.seen % WINDOW).expand(2, 1)
        kept = torch.where(finite, values[:, None], self.window.gather(1, place))
        self.window.scatter_(1, place, kept)
        self.seen += finite
        return spike.float()

    def state(self) -> dict[str, Any]:
        """Plain numbers for state.json, null for empty places of the window."""
        rows = [[None if value != value else value for value in row] for row in self.window.tolist()]
        return {"window": rows, "seen": int(self.seen)}

"""Skip updates with a non-finite loss or gradient, and stop a run that skips too many in a row."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from olmo_train.errors import NonFiniteError
from olmo_train.formats import counted
from olmo_train.guards.config import GuardConfig


def skip_if_not_finite(
    optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor, unwanted: Tensor | None = None
) -> Tensor:
    """Make the optimizer's next step an exact no-op when the loss or the gradient norm is not finite, or `unwanted` is 1.0.

    Weights, moments and the update count do not change. Returns 1.0 (skipped) or 0.0, fp32, on the device: no host sync.
    All arguments are global values, so all ranks skip the same steps.
    """
    skipped = 1.0 - (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()
    if unwanted is not None:
        skipped = torch.maximum(skipped, unwanted)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by torch's fused optimizers
    return skipped


def check_skipped(in_a_row: int, config: GuardConfig, last_good: Path | None, evidence: Path | None = None) -> None:
    """Raise NonFiniteError when too many steps in a row were skipped. `evidence`: the folder of the last one's forensics."""
    if in_a_row >= config.max_skipped:
        raise NonFiniteError(
            "guards.max_skipped",
            f"{counted(in_a_row, 'step')} in a row had a non-finite loss or gradient"
            f"{' or were spikes' if config.spike == 'skip' else ''} and changed nothing; {name_checkpoint(last_good)}; "
            f"{look_at(evidence)}lower optim.peak_lr or look at the data of these steps with inspect-data",
        )


def name_checkpoint(last_good: Path | None) -> str:
    """The part of an error that names the last good checkpoint."""
    return f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"


def look_at(evidence: Path | None) -> str:
    """The part of an error that names the forensics; empty without any."""
    return f"look at {evidence / 'README.txt'}; " if evidence else ""

"""Build the optimizer of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from olmo_train.optim.adamw import ExactAdamW, adamw
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.groups import OnWhole, on_plain
from olmo_train.optim.muon import muon


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, on_whole: OnWhole = on_plain, exactly: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over {name: parameter}, frozen ones left out; group_of says which are decayed.

    `exactly`: the bits of an update do not depend on how a parameter is sharded.
    """
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    return OPTIMIZERS[config.name](parameters, config, on_whole, ExactAdamW if exactly else torch.optim.AdamW)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state as before the first step, so that it can be loaded into, and so that memory is
    complete from the start. Weights are left as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    set_lr(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    # An exact no-op, which allocates all the same.
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

"""Build the optimizer of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from olmo_train.optim.adamw import adamw
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.groups import STANDARD, OnFullTensors, Scaling, on_unsharded
from olmo_train.optim.muon import muon


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: OptimConfig,
    adamw_class: type[torch.optim.AdamW] = torch.optim.AdamW,
    ranks: int = 1,
    on_full_tensors: OnFullTensors = on_unsharded,
    scaling: Scaling = STANDARD,
) -> torch.optim.Optimizer:
    """The optimizer over {name: parameter}, without frozen parameters; group_of decides weight decay, learning rate and epsilon
    of each.

    Work on full tensors is dealt over `ranks` and done through `on_full_tensors`.
    """
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    return OPTIMIZERS[config.name](parameters, config, adamw_class, ranks, on_full_tensors, scaling)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the optimizer's state as before the first step, so that a checkpoint can be loaded into it and memory use is
    complete from the start. Weights do not change."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    set_lr(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    # With found_inf the step changes nothing, but still allocates.
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

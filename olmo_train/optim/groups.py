"""Parameter groups: which weight decay and which learning rate a parameter gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from olmo_train.optim.config import OptimConfig


@dataclass(frozen=True)
class Group:
    """What all parameters of a group share. `set_lr` multiplies the learning rate by `lr_scale`."""

    decay: bool  # whether weight decay applies
    lr_scale: float = 1.0  # times the learning rate of the schedule


def group_of(name: str, shape: tuple[int, ...], config: OptimConfig, lr_ratio: float = 1.0) -> Group:
    """The group of the parameter called `name`. A tied head is the embedding, so it is decayed only if embeddings are. DoRA's
    magnitudes are not decayed: zero is not where they start. `lr_ratio`: the learning rate of an adapter's B and magnitudes over
    that of A, as in LoRA+ (Hayou et al. 2024) and PEFT's create_loraplus_optimizer."""
    if name.endswith(".magnitude"):
        return Group(False, lr_ratio)
    if name.endswith(".lora_b"):
        return Group(True, lr_ratio)
    if name == "embed.weight":
        return Group(config.decay_embeddings)
    return Group(config.decay_norms if "norm" in name else True)


def param_groups(parameters: Mapping[str, nn.Parameter], config: OptimConfig, lr_ratio: float = 1.0) -> list[dict]:
    """torch's parameter groups of {name: parameter}. `lr_ratio`: see group_of."""
    groups: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(group_of(name, tuple(parameter.shape), config, lr_ratio), []).append(parameter)
    return [
        {"params": params, "weight_decay": config.weight_decay * group.decay, "lr_scale": group.lr_scale}
        for group, params in groups.items()
    ]


# Applies a function to the full tensors that this rank owns, and shards the results of all ranks like the tensors:
# parallel.exchange.on_full_tensors(function, tensors, the owner of each). For one process without shards: on_unsharded.
OnFullTensors = Callable[[Callable[[list[Tensor]], list[Tensor]], list[Tensor], list[int]], list[Tensor]]


def on_unsharded(function: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor], owners: list[int]) -> list[Tensor]:
    """Apply a function to tensors that are not sharded."""
    return function(tensors)

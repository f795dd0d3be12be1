"""Parameter groups: which weight decay, learning rate and epsilon a parameter gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from olmo_train.optim.config import OptimConfig


@dataclass(frozen=True)
class Scaling:
    """Why the learning rates of parameters differ."""

    lr_ratio: float = 1.0  # that of an adapter's B and magnitudes over that of A, as in LoRA+ (Hayou et al. 2024)
    width_ratio: float = 1.0  # of the model: ModelConfig.width_ratio
    depth_ratio: float = 1.0  # ModelConfig.depth_ratio
    scales_eps: bool = False  # whether AdamW's epsilon shrinks as the gradients do, as in completep


STANDARD = Scaling()


@dataclass(frozen=True)
class Group:
    """What all parameters of a group share. `set_lr` multiplies the learning rate by `lr_scale`."""

    decay: float  # times the weight decay of the configuration
    lr_scale: float = 1.0  # times the learning rate of the schedule
    eps_scale: float = 1.0  # times the epsilon of the configuration


def group_of(name: str, shape: tuple[int, ...], config: OptimConfig, scaling: Scaling = STANDARD) -> Group:
    """The group of the parameter called `name`.

    A tied head is the embedding, so it is decayed only if embeddings are. DoRA's magnitudes are not decayed: zero is not where
    they start. Magnitudes and B share LoRA+'s learning rate, as in PEFT's create_loraplus_optimizer.

    With mup the matrices of the blocks have AdamW's learning rate over the width ratio, and weight decay times it, so that their
    product is that of the base (Yang et al. 2022, table 3; MuAdamW of the package mup). Muon's update has a spectral norm that
    grows with the root of the width, so the root is its factor. Completep also divides AdamW's epsilon (Dey et al. 2025,
    table 1).
    """
    if name.endswith((".magnitude", ".lora_b")):
        return Group(name.endswith(".lora_b"), scaling.lr_ratio)
    width, in_block = scaling.width_ratio, name.startswith("blocks.")
    eps_scale = 1 / (width * (scaling.depth_ratio if in_block else 1)) if scaling.scales_eps else 1.0
    if in_block and len(shape) == 2 and "lora_" not in name:
        ratio = width**0.5 if config.name == "muon" else width
        return Group(ratio, 1 / ratio, eps_scale)
    if name == "embed.weight":
        return Group(config.decay_embeddings, eps_scale=eps_scale)
    return Group(config.decay_norms if "norm" in name else 1.0, eps_scale=eps_scale)


def param_groups(parameters: Mapping[str, nn.Parameter], config: OptimConfig, scaling: Scaling = STANDARD) -> list[dict]:
    """torch's parameter groups of {name: parameter}."""
    groups: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(group_of(name, tuple(parameter.shape), config, scaling), []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": config.weight_decay * group.decay,
            "lr_scale": group.lr_scale,
            "eps": config.eps * group.eps_scale,
        }
        for group, params in groups.items()
    ]


# Applies a function to the full tensors that this rank owns, and shards the results of all ranks like the tensors:
# parallel.exchange.on_full_tensors(function, tensors, the owner of each). For one process without shards: on_unsharded.
OnFullTensors = Callable[[Callable[[list[Tensor]], list[Tensor]], list[Tensor], list[int]], list[Tensor]]


def on_unsharded(function: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor], owners: list[int]) -> list[Tensor]:
    """Apply a function to tensors that are not sharded."""
    return function(tensors)

"""The initial value of every parameter: a pure function of the configuration, the seed and the parameter's name.

So it depends neither on the number of ranks nor on the order of the layers. parallel/shard.py draws each full tensor on one rank,
which sends the shards to the others; this takes memory for one full parameter at a time.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor

from olmo_train.model.config import ModelConfig

CUT = 3  # standard deviations at which the normal distribution is truncated (allenai/OLMo, olmo/initialization.py)


def mitchell_std(kind: str, layer: int, config: ModelConfig) -> float:
    """OLMo's `mitchell` init (allenai/OLMo, olmo/initialization.py): 1/sqrt(fan_in); matrices that write to the
    residual stream have another factor 1/sqrt(2 * (layer + 1)). With mup, embedding and head keep the deviation of the base."""
    if kind == "attn.wo":
        return (2 * config.d_model * (layer + 1)) ** -0.5
    if kind == "mlp.w_down":
        return (2 * config.mlp_hidden * (layer + 1)) ** -0.5
    return ((config.base_width or config.d_model) if kind in ("embed", "head") else config.d_model) ** -0.5


def normal_std(kind: str, layer: int, config: ModelConfig) -> float:
    """One standard deviation for all matrices: OLMo 2. With mup, those of the blocks have it over the root of the width ratio."""
    return config.init_std * (1.0 if kind in ("embed", "head") else config.width_ratio**-0.5)


INITS = {"mitchell": mitchell_std, "normal": normal_std}


def init_std(name: str, config: ModelConfig) -> float | None:
    """Standard deviation of the parameter called `name`; None for norms, which start as constants."""
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(attn\.w[qkvo]|mlp\.w_(?:gate|up|down)|embed|head)\.weight", name)
    assert match or re.search(r"norm\.(weight|bias)$", name), f"no initial value is defined for {name}"
    return INITS[config.init](match[2], int(match[1] or 0), config) if match else None


def param_seed(seed: int, name: str) -> int:
    """63 bits that depend on every bit of the seed and of the name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The full initial value of the parameter called `name`, fp32, of `shape`.

    Matrices are drawn from a normal distribution truncated at 3 standard deviations, by inverting its distribution function:
    x = std * sqrt(2) * erfinv(u), u uniform in (-erf(3 / sqrt(2)), erf(3 / sqrt(2))). `torch.nn.init.trunc_normal_` draws
    different values in different torch versions (2.11 this way, 2.13 by rejection, which takes three times as long). Norms
    start as the identity.
    """
    std = init_std(name, config)
    if std is None:
        zero = name.endswith("bias") or config.norm == "rms_norm_offset"
        return torch.full(shape, 0.0 if zero else 1.0)
    generator = torch.Generator().manual_seed(param_seed(seed, name))
    bound = math.erf(CUT / math.sqrt(2))
    uniform = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return uniform.erfinv_().mul_(std * math.sqrt(2)).clamp_(-CUT * std, CUT * std)  # rounding could exceed the bound

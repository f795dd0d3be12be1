"""LoRA (Hu et al. 2021, arXiv 2106.09685) and DoRA (Liu et al. 2024, arXiv 2402.09353): train small matrices beside frozen ones.

A Linear with the weight W (out, in) computes with V = W + s B A, where A (r, in) and B (out, r) are trained and s is the scale:

    LoRA   y = V x
    DoRA   y = (m / n) V x, where n are the L2 norms of the rows of V, without a gradient, and m (out,) is trained

The first value of B is 0, and that of m is the norms of the rows of W, so a model with new adapters computes what its base does.
Initial values, scale and the axis of the norm are those of PEFT (github.com/huggingface/peft, src/peft/tuners/lora). There is no
dropout: resuming, replaying and recomputing rely on blocks that draw no random numbers.

Letters of shapes: r rank; out and in are the sizes of the Linear.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_train.model.config import AdapterConfig
from olmo_train.model.init import param_seed
from olmo_train.model.transformer import Transformer


class Adapter(nn.Module):
    """The trained parameters of one Linear."""

    def __init__(self, rows: int, columns: int, config: AdapterConfig):
        super().__init__()
        self.scale = config.scale
        self.lora_a = nn.Parameter(torch.empty(config.rank, columns))  # (r, in)
        self.lora_b = nn.Parameter(torch.empty(rows, config.rank))  # (out, r)
        self.magnitude = nn.Parameter(torch.empty(rows)) if config.kind == "dora" else None  # (out,)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The output (..., out) for the input x (..., in), where y (..., out) is the output of the frozen weight alone."""
        low = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))  # (..., out)
        y = torch.add(y, low, alpha=self.scale)
        if self.magnitude is None:
            return y
        factors = row_factors(self.magnitude, row_norms(weight, self.lora_a, self.lora_b, self.scale))
        return (y * factors).to(y.dtype)  # in fp32: a factor near 1 would lose its digits in bf16


@torch.no_grad()
def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The L2 norms (out,) of the rows of V = W + s B A, at least fp32, without a gradient.

    |V|^2 = |W|^2 + 2 s sum((W A^T) * B) + s^2 sum((B (A A^T)) * B), row by row, so B A (out, in) is never stored.
    """
    weight = weight.to(lora_a.dtype)
    squares = weight.square().sum(dim=1)
    squares = squares + 2 * scale * ((weight @ lora_a.T) * lora_b).sum(dim=1)
    squares = squares + scale**2 * ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(dim=1)
    return squares.clamp(min=0).sqrt()


def row_factors(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / n (out,); 1 where n is 0, as a row of zeros has no direction that m could scale. Some released models have such rows,
    and 0 / 0 would make all of their outputs NaN."""
    is_zero = norms == 0
    return torch.where(is_zero, 1.0, magnitude / torch.where(is_zero, 1.0, norms))


class AdaptedLinear(nn.Linear):
    """A Linear with a frozen weight and an adapter."""

    def __init__(self, base: nn.Linear, config: AdapterConfig):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.adapter = Adapter(base.out_features, base.in_features, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, F.linear(x, self.weight), self.weight)


def adapt(model: Transformer, config: AdapterConfig) -> Transformer:
    """Freeze all weights and add adapters to the targets of every block, in place. Names of weights stay; an adapter's parameters
    are NAME.adapter.lora_a, .lora_b and, with DoRA, .magnitude. They have no values yet, see `first_values`."""
    model.requires_grad_(False)
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            for name, child in list(part.named_children()):
                if name in config.targets and isinstance(child, nn.Linear):
                    setattr(part, name, AdaptedLinear(child, config))
    return model


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, module) of every Linear with an adapter."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


def is_adapter(name: str) -> bool:
    """Whether the parameter called `name` belongs to an adapter."""
    return ".adapter." in name


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of what a checkpoint of this model holds: its adapters, or without adapters all parameters. The frozen
    weights are those of the base, which the checkpoint names."""
    parameters = dict(model.named_parameters())
    return {name: p for name, p in parameters.items() if is_adapter(name)} or parameters


@torch.no_grad()
def first_values(name: str, module: AdaptedLinear, weight: Tensor, seed: int) -> dict[str, Tensor]:
    """The first values of the adapter of the Linear called `name`, fp32 or as precise as the weight, from its frozen weight
    (out, in): A is uniform in +-1/sqrt(in), which is kaiming_uniform_(a=sqrt(5)), B is 0, m is the norms of the rows of W."""
    (rows, columns), rank = weight.shape, module.adapter.lora_a.shape[0]
    generator = torch.Generator().manual_seed(param_seed(seed, f"{name}.adapter.lora_a"))
    bound = columns**-0.5
    lora_a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator).to(weight.device)
    values = {"lora_a": lora_a.to(module.adapter.lora_a.dtype)}
    values["lora_b"] = torch.zeros(rows, rank, device=weight.device, dtype=values["lora_a"].dtype)
    if module.adapter.magnitude is not None:
        values["magnitude"] = row_norms(weight, values["lora_a"], values["lora_b"], module.adapter.scale)
    return values


def merged(weight: Tensor, adapter: dict[str, Tensor], scale: float) -> Tensor:
    """The weight (out, in) of a plain Linear that computes what W and its adapter {lora_a, lora_b, magnitude} compute."""
    v = weight + scale * (adapter["lora_b"] @ adapter["lora_a"])
    return row_factors(adapter["magnitude"], v.norm(dim=1))[:, None] * v if "magnitude" in adapter else v

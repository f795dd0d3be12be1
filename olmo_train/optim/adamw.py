"""AdamW: torch's fused kernel, and a version whose bits do not depend on the sharding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from olmo_train.optim.config import OptimConfig
from olmo_train.optim.groups import STANDARD, OnFullTensors, Scaling, on_unsharded, param_groups


def adamw(
    parameters: Mapping[str, nn.Parameter],
    config: OptimConfig,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
    ranks: int = 1,
    on_full_tensors: OnFullTensors = on_unsharded,
    scaling: Scaling = STANDARD,
) -> torch.optim.AdamW:
    """torch's fused AdamW. Its `found_inf` makes a step an exact no-op without a host sync (see guards/nonfinite.py)."""
    return kind(param_groups(parameters, config, scaling), lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


class DeterministicAdamW(torch.optim.AdamW):
    """AdamW as separate operations, each rounded once. The fused kernel rounds a multiply-add once or twice, depending on the
    place of an element in its shard, so its last bit depends on the sharding."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict) -> None:
        state, (beta1, beta2), gradient = self.state[parameter], group["betas"], parameter.grad
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        skipped = torch.zeros_like(state["step"]) if self.found_inf is None else self.found_inf  # type: ignore[attr-defined]
        count = (state["step"] + 1).double()
        mean = (state["exp_avg"] * beta1).add_(gradient * (1 - beta1))
        square = (state["exp_avg_sq"] * beta2).add_(gradient.square().mul_(1 - beta2))
        correction1, correction2 = ((1 - beta**count).float() for beta in (beta1, beta2))
        update = (mean / correction1).div_((square / correction2).sqrt_().add_(group["eps"])).mul_(group["lr"])
        stepped = (parameter * (1 - group["lr"] * group["weight_decay"])).sub_(update)
        for kept, new in ((state["exp_avg"], mean), (state["exp_avg_sq"], square), (parameter, stepped)):
            kept.copy_(torch.where(skipped > 0, kept, new))
        state["step"] += 1 - skipped

"""Muon for the matrices of the blocks (Jordan et al. 2024), with AdamW for the other parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from olmo_train.optim.adamw import adamw
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.groups import OnFullTensor, param_groups


def muon(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, on_full_tensor: OnFullTensor, kind: type[torch.optim.AdamW]
) -> Muon:
    """Muon for the matrices of the blocks, AdamW for embedding, head and norms."""
    matrices = {name: p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    return Muon(param_groups(matrices, config), adamw(rest, config, kind=kind), config, on_full_tensor)


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) on full matrices, for any sharding, and AdamW for the other parameters.

    Every rank gathers a matrix to orthogonalize its momentum; the momentum itself stays sharded. The update is scaled to the
    size of AdamW's (Liu et al. 2025), so that both share learning rate and weight decay. Like torch's fused AdamW it reads
    `found_inf`: with 1.0 there a step is an exact no-op, without a host sync.
    """

    def __init__(self, matrices: list[dict], rest: torch.optim.AdamW, config: OptimConfig, on_full_tensor: OnFullTensor):
        super().__init__(matrices, lr=config.peak_lr, momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw")
        self.matrices, self.rest, self.on_full_tensor = list(self.param_groups), rest, on_full_tensor
        self.param_groups += rest.param_groups  # one list, so that set_lr and zero_grad see all groups
        rest.state = self.state  # shared, so that a checkpoint saves both
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.matrices:
            for parameter in group["params"]:
                self._step_matrix(parameter, group)
        self.rest.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.rest.step()

    def _step_matrix(self, parameter: nn.Parameter, group: dict) -> None:
        """The arithmetic of torch.optim.Muon, all in fp32. Works on copies, which are written back unless the step is skipped."""
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        skipped = torch.zeros_like(state["step"]) if self.found_inf is None else self.found_inf
        # Multiply and add separately: in a fused operation the last bit depends on an element's place in its shard.
        buffer = (state["momentum_buffer"] * momentum).add_(parameter.grad * (1 - momentum))
        update = (parameter.grad * (1 - momentum)).add_(buffer * momentum) if group["nesterov"] else buffer
        update = self.on_full_tensor(orthogonalize, update)
        lr = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
        stepped = (parameter * (1 - group["lr"] * group["weight_decay"])).sub_(update * lr)
        for kept, new in ((state["momentum_buffer"], buffer), (parameter, stepped)):
            kept.copy_(torch.where(skipped > 0, kept, new))
        state["step"] += 1 - skipped


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1, by five quintic Newton-Schulz iterations (Jordan et al. 2024, with
    their coefficients). In fp32: in bf16, as in torch, rounding differences between world sizes grow to 1e-2 of the update."""
    a, b, c = 3.4445, -4.775, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x

"""Muon for the matrices of the blocks (Jordan et al. 2024), with AdamW for the other parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from olmo_train.deal import deal, in_rounds
from olmo_train.optim.adamw import adamw
from olmo_train.optim.config import NEWTON_SCHULZ_STEPS, ROUND_ELEMENTS, OptimConfig, newton_schulz_flops
from olmo_train.optim.groups import STANDARD, OnFullTensors, Scaling, param_groups


def muon(
    parameters: Mapping[str, nn.Parameter],
    config: OptimConfig,
    kind: type[torch.optim.AdamW],
    ranks: int,
    on_full_tensors: OnFullTensors,
    scaling: Scaling = STANDARD,
) -> Muon:
    """Muon for the matrices of the blocks, AdamW for embedding, head and norms. The configuration refuses it for adapters."""
    assert scaling.lr_ratio == 1, scaling
    matrices = {name: p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    by_adamw = adamw(rest, config, kind, scaling=scaling)
    return Muon(param_groups(matrices, config, scaling), by_adamw, config, ranks, on_full_tensors)


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) on full matrices, for any sharding, and AdamW for the other parameters.

    Each matrix is orthogonalized on one rank, and the ranks have equal shares of the work; the momentum stays sharded. The
    update is scaled to the size of AdamW's (Liu et al. 2025), so that both share learning rate and weight decay. Like torch's
    fused AdamW it reads `found_inf`: with 1.0 there a step is an exact no-op, without a host sync.
    """

    def __init__(
        self, matrices: list[dict], rest: torch.optim.AdamW, config: OptimConfig, ranks: int, on_full_tensors: OnFullTensors
    ):
        super().__init__(matrices, lr=config.peak_lr, momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw")
        self.matrices = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self.owners = deal([newton_schulz_flops(*parameter.shape) for parameter, _ in self.matrices], ranks)
        sizes = [parameter.numel() for parameter, _ in self.matrices]
        self.rounds = in_rounds(sizes, self.owners, max([ROUND_ELEMENTS, *sizes]))  # which bounds the memory of full matrices
        self.rest, self.on_full_tensors = rest, on_full_tensors
        self.param_groups += rest.param_groups  # one list, so that set_lr and zero_grad see all groups
        rest.state = self.state  # shared, so that a checkpoint saves both
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for pieces in self.rounds:
            matrices = [self.matrices[i] for i in pieces]
            updates = [self._update_momentum(parameter, group) for parameter, group in matrices]
            updates = self.on_full_tensors(orthogonalize, updates, [self.owners[i] for i in pieces])
            for (parameter, group), update in zip(matrices, updates, strict=True):
                self._apply(parameter, group, update)
        self.rest.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.rest.step()

    def _update_momentum(self, parameter: nn.Parameter, group: dict) -> Tensor:
        """Add the gradient to the momentum, in fp32; returns what is orthogonalized, in the precision of newton_schulz."""
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # Multiply and add separately: in a fused operation the last bit depends on an element's place in its shard.
        buffer = (state["momentum_buffer"] * momentum).add_(parameter.grad * (1 - momentum))
        update = (parameter.grad * (1 - momentum)).add_(buffer * momentum) if group["nesterov"] else buffer
        self._write(state["momentum_buffer"], buffer)
        state["step"] += 1 - self._skipped(parameter)
        return update.to(torch.bfloat16 if parameter.is_cuda else torch.float32)

    def _apply(self, parameter: nn.Parameter, group: dict, update: Tensor) -> None:
        lr = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
        decayed = parameter * (1 - group["lr"] * group["weight_decay"])
        self._write(parameter, decayed.sub_(update.to(parameter.dtype) * lr))

    def _write(self, kept: Tensor, new: Tensor) -> None:
        """Replace a tensor by its new value, unless the step is skipped."""
        kept.copy_(torch.where(self._skipped(kept) > 0, kept, new))

    def _skipped(self, tensor: Tensor) -> Tensor:
        return torch.zeros((), device=tensor.device) if self.found_inf is None else self.found_inf


def orthogonalize(matrices: list[Tensor], in_batches: bool | None = None) -> list[Tensor]:
    """The nearest matrix with singular values near 1 to each of the matrices.

    `in_batches`: all matrices of one shape in one batch, which keeps a GPU busy; None: on a GPU, unless torch must be
    deterministic, since the rounding of a product may depend on the size of its batch, and so on the number of ranks.
    """
    if in_batches is None:
        in_batches = any(matrix.is_cuda for matrix in matrices) and not torch.are_deterministic_algorithms_enabled()
    if not in_batches:
        return [newton_schulz(matrix) for matrix in matrices]
    done: dict[torch.Size, list[Tensor]] = {}
    for shape in {matrix.shape for matrix in matrices}:
        done[shape] = list(newton_schulz(torch.stack([matrix for matrix in matrices if matrix.shape == shape])))
    return [done[matrix.shape].pop(0) for matrix in matrices]


def newton_schulz(x: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1, by quintic Newton-Schulz iterations (Jordan et al. 2024, with their
    coefficients), for x (..., rows, columns).

    In the precision of x: bf16 on a GPU, as in torch. On a CPU fp32: in bf16 the rounding differences between world sizes grow
    to 1e-2 of the update.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        if x.dtype == torch.bfloat16:  # round each sum once, within its product
            x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

"""Gradients of a sharded model: accumulation over micro-batches, the global norm, clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from olmo_train.parallel.shard import full_tensor


def last_micro_batch(model: nn.Module, last: bool) -> None:
    """Reduce gradients over ranks with the last micro-batch only; earlier ones accumulate on each rank. Weights that stay
    gathered after the forward stay gathered until then."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(last or not model.keeps_weights)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, deterministic: bool = False) -> tuple[Tensor, tuple[list[str], Tensor]]:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; no host sync.

    Returns the norm before clipping, fp32, and the names of the parameters that have a gradient with the norm of each: a
    DTensor that `full_tensor` reduces over ranks, which costs nothing unless it is called.

    The coefficient is min(1, max_norm / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_ and OLMo. It is applied
    to a non-finite norm too: such a step is skipped. `deterministic`: the bits of the norm do not depend on the sharding.
    """
    names, gradients = zip(*((name, p.grad) for name, p in model.named_parameters() if p.grad is not None), strict=True)
    if deterministic:
        norm, norms = exact_norm(gradients)
    else:
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = full_tensor(torch.linalg.vector_norm(norms))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm, (list(names), norms)


@torch.no_grad()
def exact_norm(gradients: Sequence[DTensor]) -> tuple[Tensor, Tensor]:
    """The global L2 norm of sharded gradients, and the norm of each, (gradients,), fp32; infinite if a gradient is not finite.

    Squares are summed as integers, scaled for each tensor by its largest element so that the sum fits in 63 bits.
    """
    local = [
        gradient.to_local().double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) for gradient in gradients
    ]
    largest = _over_ranks(torch.stack([g.abs().max() if g.numel() else g.new_zeros(()) for g in local]), gradients[0], "max")
    scale = largest.frexp().exponent.double().exp2()  # (tensors,): largest < scale
    units = [2.0 ** (62 - gradient.numel().bit_length()) for gradient in gradients]
    parts = [((g / s).square() * unit).round().long().sum() for g, s, unit in zip(local, scale, units, strict=True)]
    total = _over_ranks(torch.stack(parts), gradients[0], "sum")
    squares = total.double() / torch.tensor(units, dtype=torch.float64, device=total.device) * scale.square()
    norm = torch.where(largest.isfinite().all(), squares.sum().sqrt(), torch.inf)
    return norm.float(), torch.where(largest.isfinite(), squares.sqrt(), torch.inf).float()


def _over_ranks(values: Tensor, like: DTensor, operation: str) -> Tensor:
    """Reduce values of this rank's shards over the ranks that hold the other shards."""
    placements = [Partial(operation) if isinstance(placement, Shard) else Replicate() for placement in like.placements]
    return DTensor.from_local(values, like.device_mesh, placements, run_check=False).full_tensor()

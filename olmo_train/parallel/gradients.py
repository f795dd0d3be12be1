"""Gradients of a sharded model: accumulation over micro-batches, the global norm, clipping."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from olmo_train.parallel.determinism import NormFunction, l2_norm


def last_micro_batch(model: nn.Module, last: bool) -> None:
    """Reduce gradients over ranks with the last micro-batch only; earlier ones accumulate on each rank. Weights that stay
    gathered after the forward stay gathered until then."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(last or not model.keeps_weights)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)


@torch.no_grad()
def clip_gradients(
    model: nn.Module, max_norm: float, norm_function: NormFunction = l2_norm
) -> tuple[Tensor, tuple[list[str], Tensor]]:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; no host sync.

    Returns the norm before clipping, fp32, and the names of the parameters that have a gradient with the norm of each: a
    DTensor that `full_tensor` reduces over ranks, which costs nothing unless it is called.

    The coefficient is min(1, max_norm / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_ and OLMo. It is applied
    to a non-finite norm too: such a step is skipped.
    """
    names, gradients = zip(*((name, p.grad) for name, p in model.named_parameters() if p.grad is not None), strict=True)
    norm, norms = norm_function(gradients)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm, (list(names), norms)

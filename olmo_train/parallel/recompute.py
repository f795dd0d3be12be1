"""The forward of a block in training: which activations it saves, which its backward recomputes, and whether it is compiled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# `selective` saves the outputs of these: matrix products and every kind of attention. By name, because torch registers some
# operations only at their first use.
SAVED_OPS = {
    "aten.mm.default",
    "aten._scaled_mm.default",
    "flex_attention",
    "olmo_train.cpu_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    *(f"aten._scaled_dot_product_{kind}_attention.default" for kind in ("flash", "efficient", "cudnn")),
}


def selective_policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Save matrix products and attention, which are most of the compute and less than half of the memory; recompute the rest."""
    return CheckpointPolicy.MUST_SAVE if str(operation) in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


# It asks for blocks without operations in place, which ours are, in each process that compiles with `selective`.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in str(record.msg))

# No block draws random numbers, so there is no random state to restore.
_recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
RECOMPUTED = {
    "selective": functools.partial(
        _recomputed, context_fn=functools.partial(create_selective_checkpoint_contexts, selective_policy)
    ),
    "full": _recomputed,
}


def training_forward(forward: Callable[..., Tensor], checkpointing: str, compiled: bool) -> Callable[..., Tensor]:
    """A block's forward that recomputes activations (`checkpointing`, a key of RECOMPUTED or "none") and is compiled.

    Compilation is outside: torch.utils.checkpoint is opaque to the compiler, so inside of it nothing would be compiled. All
    blocks then share one graph; a graph break is an error (fullgraph). Without gradients, as in evaluation and generation,
    shapes vary from call to call, so the plain forward runs.
    """
    trained = forward if checkpointing == "none" else functools.partial(RECOMPUTED[checkpointing], forward)
    if compiled:
        trained = torch.compile(trained, fullgraph=True)
    if trained is forward:
        return forward
    return lambda *inputs: trained(*inputs) if torch.is_grad_enabled() else forward(*inputs)

"""Activation checkpointing: which activations a block saves in its forward, and which its backward recomputes."""

from __future__ import annotations

import functools

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


# No block draws random numbers, so there is no random state to restore.
_recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
RECOMPUTED = {
    "selective": functools.partial(
        _recomputed, context_fn=functools.partial(create_selective_checkpoint_contexts, selective_policy)
    ),
    "full": _recomputed,
}

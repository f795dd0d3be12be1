"""Activation checkpointing: what a block keeps from its forward, and what its backward computes again."""

from __future__ import annotations

import functools

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Whose outputs `selective` keeps, by name, as some exist only once they are used: products, and every kind of attention.
DEAR = {"aten.mm.default", "aten._scaled_mm.default", "flex_attention", "olmo_train.cpu_attention.default"}


def keep_dear(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Products and attention are most of the compute and the lesser part of the memory; the rest is soon computed again."""
    return CheckpointPolicy.MUST_SAVE if str(operation) in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


# Nothing in a block draws random numbers, so there is no state of a generator to set back.
_recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
RECOMPUTED = {
    "selective": functools.partial(_recomputed, context_fn=functools.partial(create_selective_checkpoint_contexts, keep_dear)),
    "full": _recomputed,
}

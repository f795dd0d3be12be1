"""Whatever value a gradient is spoiled with, on whichever rank and step: no committed checkpoint ever holds it."""

import math
import random
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_guards import EVERY, states_of, unchanged

from olmo_train import train as module
from olmo_train.checkpoint.folders import committed
from olmo_train.train import train

VALUES = (math.nan, math.inf, -math.inf, 1e30)


def spoil(step: int, rank: int, value: float, choice: random.Random, world) -> None:
    """The gradient of update `step` holds `value` in some element of some tensor of one rank. Once in a process."""
    real, seen = module.gradients.clip_gradients, []

    def spoiled(model, *args, **options):
        seen.append(1)
        if len(seen) == step and world.rank == rank:
            shards = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
            shard = choice.choice([shard for shard in shards if shard.numel()])
            shard.view(-1)[choice.randrange(shard.numel())] = value
        return real(model, *args, **options)

    module.gradients.clip_gradients = spoiled


def skipped_steps(config, ranks: int, step: int, rank: int, value: float, seed: int = 0) -> list[int]:
    """Those of a run with a spoiled gradient, on which all ranks agree."""

    def run(world):
        spoil(step, rank, value, random.Random(seed), world)
        return [stats.step for stats in train(config, world) if stats.skipped]

    first, *others = on_ranks(ranks, run)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("value", VALUES[1:])
def test_one_value_on_one_of_two_ranks_is_skipped_on_both(tiny_args, value):
    """NaN: see test_guards."""
    config = tiny_args("run", **EVERY)
    assert skipped_steps(config, 2, step=4, rank=1, value=value) == [4]
    assert unchanged(config.run_dir, 3, 4) and not unchanged(config.run_dir, 4, 5)


@pytest.mark.slow
def test_in_50_seeds_no_checkpoint_holds_what_is_not_finite(tiny_args):
    for seed in range(50):
        choice = random.Random(seed)
        ranks, step, value = choice.choice((1, 2)), choice.randint(1, 6), choice.choice(VALUES)
        config = tiny_args(f"run-{seed}", seed=seed, **EVERY)
        rank = choice.randrange(ranks)
        assert skipped_steps(config, ranks, step, rank, value, seed) == [step], (seed, ranks, step, rank, value)
        steps = list(committed(Path(config.run_dir)))
        assert steps == [1, 2, 3, 4, 5, 6]
        for saved in steps:
            tensors = states_of(config.run_dir, saved)
            assert len(tensors) > 20 and all(torch.isfinite(t).all() for t in tensors.values()), (seed, saved)

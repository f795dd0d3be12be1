"""Replicas hold the same bits, and a rank that does not is found before a checkpoint is committed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

import olmo_train.train as module
from olmo_train.checkpoint.folders import committed
from olmo_train.errors import ReplicaError
from olmo_train.guards import replicas
from olmo_train.guards.replicas import divergence, find_outliers, fingerprint
from olmo_train.train import train

SHORT = {"total_steps": 6, "checkpoint.interval_steps": 2, "micro_batch_size": 2}


def test_a_fingerprint_changes_with_any_single_bit_and_with_the_place(monkeypatch):
    monkeypatch.setattr(replicas, "CHUNK", 16)
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    prints = {fingerprint(values).item(), fingerprint(values.flip(0)).item()}
    for place in (0, 15, 16, 49):
        for bit in range(32):
            flipped = values.clone()
            flipped.view(torch.int32)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            prints.add(fingerprint(flipped).item())
    assert len(prints) == 2 + 4 * 32
    assert fingerprint(values.clone()) == fingerprint(values)
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))
    assert fingerprint(torch.empty(0)) == 0  # a rank beyond the rows of a small weight


def test_the_majority_tells_who_is_odd_and_two_are_both_named():
    assert find_outliers({0: "a", 1: "a", 2: "a"}) == []
    assert find_outliers({0: "a", 2: "b", 4: "a"}) == [2]
    assert find_outliers({1: "a", 3: "b"}) == [1, 3]
    assert find_outliers({0: "a", 1: "b", 2: "c"}) == [0, 1, 2]


def flip_after(step: int, rank: int, world, name: str, key: str | None = None) -> None:
    """Flip one bit of one number of this rank's part of a weight, or of its optimizer's state, after a step."""
    ordinary = module.train_step

    def train_step(model, optimizer, batch, *others):
        stats = ordinary(model, optimizer, batch, *others)
        if (batch.step, world.rank) == (step, rank):
            parameter = dict(model.named_parameters())[name]
            tensor = optimizer.state[parameter][key] if key else parameter.detach()
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local.view(-1).view(torch.int32)[-1:] ^= 1 << 20
        return stats

    module.train_step = train_step


def in_replicas(world, copies: int):
    """The world with that many replicas of the state."""
    mesh = init_device_mesh("cpu", (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))
    return dataclasses.replace(world, mesh=mesh)


def run_on(size: int, copies: int, config, *flip) -> list:
    """For each rank: (steps done, what it was stopped by)."""

    def run(world):
        if copies > 1:
            world = in_replicas(world, copies)
        if flip:
            flip_after(*flip[:2], world, *flip[2:])
        done = 0
        try:
            for stats in train(config, world):
                done = stats.step
        except ReplicaError as problem:
            return done, str(problem)
        return done, None

    return on_ranks(size, run)


def test_replicas_that_agree_run_through(tiny_args):
    config = tiny_args("run", **SHORT | {"parallel.replicas": 2, "guards.replica_check_steps": 1})
    assert run_on(2, 2, config) == [[6, None]] * 2
    assert sorted(committed(Path(config.run_dir))) == [2, 4, 6]


@pytest.mark.parametrize("key", [None, "exp_avg"])
def test_one_bit_of_one_replica_stops_both_before_the_checkpoint(tiny_args, key):
    config = tiny_args("run", **SHORT | {"parallel.replicas": 2})
    first, second = run_on(2, 2, config, 3, 1, "embed.weight", key)
    assert first == second and first[0] == 4  # the update is made, the state after it not saved
    assert "after step 4 rank 0 (" in first[1] and "and rank 1 (" in first[1]
    assert "step-0000002" in first[1]
    assert sorted(committed(Path(config.run_dir))) == [2]


def test_it_is_found_at_the_step_that_is_asked_for(tiny_args):
    config = tiny_args("run", **SHORT | {"parallel.replicas": 2, "guards.replica_check_steps": 3})
    first, second = run_on(2, 2, config, 3, 1, "embed.weight")
    assert first == second and "after step 3 rank 0 (" in first[1] and "first in model.embed.weight" in first[1]


def test_without_replicas_what_every_rank_holds_alike_is_compared(tiny_args):
    config = tiny_args("run", **SHORT)
    first, second = run_on(2, 1, config, 3, 1, "embed.weight", "step")
    assert first == second and "after step 4 rank 0 (" in first[1] and "count of updates" in first[1]
    assert sorted(committed(Path(config.run_dir))) == [2]


def test_of_four_ranks_in_two_replicas_only_those_of_the_same_place_are_suspected():
    def run(world):
        weight = torch.full((3,), float(world.rank % 2))
        found = [divergence({"w": weight}, {}, world, 2)]
        weight += world.rank == 3
        found.append(divergence({"w": weight}, {}, world, 2))
        found.append(divergence({}, {"n": torch.tensor(float(world.rank == 2))}, world, 2))
        return found

    [(same, shards, alike)] = {tuple(found) for found in on_ranks(4, run)}
    assert same is None
    assert "rank 1 (" in shards and "rank 3 (" in shards and "rank 0" not in shards and "first in w" in shards
    assert alike.startswith("rank 2 (") and "holds other bits than its peers, first in n" in alike

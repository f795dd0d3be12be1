"""Any number of processes goes on with what any other has saved; late writes of one rank delay, and never hang, the others."""

import argparse
import dataclasses
import json
import math
import random
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from crash import run
from ranks import on_ranks
from test_guards import poison
from torch.distributed.device_mesh import init_device_mesh

from olmo_train import train as module
from olmo_train.checkpoint import folders as checkpoint_folders
from olmo_train.checkpoint import save
from olmo_train.commands.inspect_data import _world_size
from olmo_train.data.inspect import rows_of_step
from olmo_train.guards.forensics import folder_of
from olmo_train.history import History
from olmo_train.storage import problems_of

COMPARED = ("train/CrossEntropyLoss", "optim/total_grad_norm", "sample_hash")


def history(run_dir: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    return [tuple(line[name] for name in COMPARED) for line in lines]


@pytest.mark.slow
def test_every_number_of_processes_goes_on_with_what_every_other_saved(tiny_words, tmp_path):
    """Worlds of 1, 2 and 4 in both directions: bitwise on the same number, within 1e-6 on another."""
    same = {"micro_batch_size": 2, "checkpoint.interval_steps": 3, "optim.schedule_steps": 6}
    whole = {}
    for size in (1, 2, 4):
        name = f"whole-{size}"
        assert run(tiny_words(name, total_steps=6, **same), tmp_path / name, size)[0] == [0] * size
        assert run(tiny_words(f"half-{size}", total_steps=3, **same), tmp_path / f"half-{size}", size)[0] == [0] * size
        whole[size] = history(tmp_path / name)
    for saved in (1, 2, 4):
        for resumed in (1, 2, 4):
            name = f"{saved}-then-{resumed}"
            shutil.copytree(tmp_path / f"half-{saved}", tmp_path / name)
            assert run(tiny_words(name, total_steps=6, **same), tmp_path / name, resumed)[0] == [0] * resumed
            lines = history(tmp_path / name)
            if saved == resumed:
                assert lines == whole[saved]
            for (loss, norm, sample), (other_loss, other_norm, other_sample) in zip(lines, whole[1], strict=True):
                assert sample == other_sample
                assert loss == pytest.approx(other_loss, rel=1e-6) and norm == pytest.approx(other_norm, rel=1e-5)


def late_run(tiny_args, name: str, seed: int) -> list:
    """Two ranks train and save after every second step, while every write of one of them is late by up to 0.3 s."""
    config = tiny_args(name, total_steps=8, **{"checkpoint.interval_steps": 2, "checkpoint.keep_last": 2})
    real = save.write_file
    rng = random.Random(seed)

    def late(*args):
        time.sleep(rng.uniform(0, 0.3))
        return real(*args)

    def train(world):
        if world.rank == seed % 2:
            save.write_file = late
        return [stats.step for stats in module.train(config, world)]

    steps = on_ranks(2, train)
    folders = checkpoint_folders.committed(Path(config.run_dir))
    assert [problems_of(folder) for folder in folders.values()] == [[], []]
    return [steps, list(folders)]


def test_late_writes_of_one_rank_hold_no_run_up(tiny_args):
    assert late_run(tiny_args, "late", 1) == [[[1, 2, 3, 4, 5, 6, 7, 8]] * 2, [6, 8]]


@pytest.mark.slow
def test_twenty_of_twenty_runs_with_late_writes_finish(tiny_args):
    finished = [late_run(tiny_args, f"late-{seed}", seed) for seed in range(20)]
    assert finished == [[[[1, 2, 3, 4, 5, 6, 7, 8]] * 2, [6, 8]]] * 20


def test_rows_follow_data_rank_and_not_rank(tiny_args, tiny_tokens, monkeypatch, read_metrics):
    """Two processes that hold copies of one model and read the same rows log what one process does; so does a bad step."""
    poison(2, math.nan, monkeypatch)
    changes = {"total_steps": 3, "data.validation.v.path": tiny_tokens, "eval.interval_steps": 3}

    def sharing_rows(world):
        alone, _ = dist.new_subgroups(1)
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard"))["shard"]
        world = dataclasses.replace(world, data_rank=0, data_size=1, data_group=alone, mesh=mesh)
        return [stats.losses.tolist() for stats in module.train(tiny_args("two", **changes), world)][::2]

    one, two = tiny_args("one", **changes), tiny_args("two")
    shared = on_ranks(2, sharing_rows)
    losses = [stats.losses.tolist() for stats in module.train(one)][::2]
    assert len(losses[0]) == 8 and shared == [losses, losses]
    lines, others = (read_metrics(config.run_dir) for config in (one, two))
    for line, other in zip(lines, others, strict=True):
        assert {line["world_size"], other["world_size"]} == {1, 2}
        assert all(other[key] == line[key] for key in line if key.startswith(("eval", "train", "optim", "sample", "skipped")))
    bad, other = (json.loads((folder_of(Path(c.run_dir), 2) / "step.json").read_text()) for c in (one, two))
    assert bad["sequences"] == other["sequences"] and len(other["environment"]["ranks"]) == 2
    assert one_rank(two) == one_rank(one) == {0}


def one_rank(config) -> set[int]:
    """The ranks that inspect-data shows for a step of this run."""
    attempt = History(Path(config.run_dir)).attempt_of(2)
    arguments = argparse.Namespace(world_size=None)
    return {row.rank for row in rows_of_step(attempt.mixture(), 2, _world_size(attempt, arguments))}

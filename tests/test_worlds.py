"""The number of processes and the size of a micro-batch change speed and memory, and nothing else. Any number of processes
resumes what any other has saved. Late writes of one rank delay, and never hang, the others."""

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from crash import run
from data_sources import prepare_source
from ranks import on_ranks
from runs import GRAD_NORM, LOSS, history, trained_on
from test_guards import poison
from torch.distributed.device_mesh import init_device_mesh

from olmo_train import train as module
from olmo_train.checkpoint import folders as checkpoint_folders
from olmo_train.checkpoint import save
from olmo_train.commands.inspect_data import _world_size
from olmo_train.data.config import SourceConfig
from olmo_train.data.inspect import rows_of_step
from olmo_train.data.shards import open_source
from olmo_train.guards.forensics import folder_of
from olmo_train.history import History
from olmo_train.storage import problems_of

STEPS = 20


def relative(a, b, name="train/CrossEntropyLoss"):
    return max(abs(x[name] / y[name] - 1) for x, y in zip(a, b, strict=True))


@pytest.fixture
def metrics(tiny_args, read_metrics):
    """metrics(name, size=1, **changes): the metrics of a run of `size` processes."""

    def run(name, size=1, **changes):
        return read_metrics(trained_on(size, tiny_args(name, **{"total_steps": STEPS, **changes})).run_dir)

    return run


def test_two_processes_train_as_one(metrics):
    one, two = metrics("one"), metrics("two", 2)
    assert [line["sample_hash"] for line in one] == [line["sample_hash"] for line in two]
    assert {line["world_size"] for line in two} == {2}
    assert relative(one, two) < 1e-6
    assert relative(one, two, "optim/total_grad_norm") < 1e-5
    assert [line["optim/learning_rate_group0"] for line in one] == [line["optim/learning_rate_group0"] for line in two]
    assert one[-1]["train/CrossEntropyLoss"] < one[0]["train/CrossEntropyLoss"] - 0.3  # there was something to agree on


def test_the_size_of_a_micro_batch_changes_nothing(metrics):
    runs = [metrics(f"micro-{rows}", micro_batch_size=rows) for rows in (2, 4, 8)]
    assert runs[0][-1]["train/CrossEntropyLoss"] < runs[0][0]["train/CrossEntropyLoss"] - 0.3
    for other in runs[1:]:
        assert [line["sample_hash"] for line in other] == [line["sample_hash"] for line in runs[0]]
        assert relative(runs[0], other) < 1e-6


def test_bf16_with_fp32_reduction_trains_on_two_processes(metrics):
    """bf16 rounds away 8 bits, so worlds agree less closely than in fp32, and still closely."""
    one, two = (metrics(f"on-{size}", size, total_steps=12, **{"parallel.precision": "bf16"}) for size in (1, 2))
    assert relative(one, two) < 2e-3
    exact = metrics("exact", total_steps=12)
    assert 1e-7 < relative(one, exact) < 1e-2  # bf16 was really used, and is close to fp32


def test_unevenly_masked_labels_train_as_in_one_process(metrics, tmp_path):
    """Prompts are not scored, so ranks and micro-batches differ in how many tokens count."""
    generator = random.Random(0)
    records = [{"prompt": " ".join(["the cat"] * generator.randint(1, 60)), "response": "sat on a mat " * generator.randint(0, 4)}
               for _ in range(80)]  # fmt: skip
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder, _ = prepare_source(tmp_path, file)
    changes = {"data.sources.a.path": folder, "total_steps": 10, "micro_batch_size": 1}
    one, two = (metrics(f"on-{size}", size, **changes) for size in (1, 2))
    whole = metrics("whole", **changes | {"micro_batch_size": 8})
    for other in (two, whole):
        assert relative(one, other) < 1e-6 and relative(one, other, "optim/total_grad_norm") < 1e-5
    shares = [mask_share(folder, *span) for span in ((0, 64), (64, 128), (128, 192), (192, 256))]
    assert len(set(shares)) > 1  # the masks are uneven indeed


def mask_share(folder, start, stop):
    mask = np.empty(stop - start, dtype=np.uint8)
    open_source("a", SourceConfig(str(folder)), 512).read_label_mask(start, mask)
    return mask.mean()


def test_a_world_of_one_leaves_nothing_behind_when_it_is_killed(tmp_path):
    """It needs neither a port nor a file to meet the other processes that it does not have."""
    program = (
        "import os, signal\nfrom olmo_train.parallel.world import join_world\n"
        "with join_world() as world:\n    assert world.any(3) == 3\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == -signal.SIGKILL and list(tmp_path.iterdir()) == []


# ---- checkpoints between worlds, and late writes


@pytest.mark.slow
def test_every_number_of_processes_goes_on_with_what_every_other_saved(tiny_words, tmp_path):
    """Worlds of 1, 2 and 4 in both directions: bitwise on the same number, within 1e-6 on another."""
    same = {"micro_batch_size": 2, "checkpoint.interval_steps": 3, "optim.schedule_steps": 6}
    whole = {}
    for size in (1, 2, 4):
        name = f"whole-{size}"
        assert run(tiny_words(name, total_steps=6, **same), tmp_path / name, size)[0] == [0] * size
        assert run(tiny_words(f"half-{size}", total_steps=3, **same), tmp_path / f"half-{size}", size)[0] == [0] * size
        whole[size] = history(tmp_path / name, LOSS, GRAD_NORM, "sample_hash")
    for saved in (1, 2, 4):
        for resumed in (1, 2, 4):
            name = f"{saved}-then-{resumed}"
            shutil.copytree(tmp_path / f"half-{saved}", tmp_path / name)
            assert run(tiny_words(name, total_steps=6, **same), tmp_path / name, resumed)[0] == [0] * resumed
            assert history(tmp_path / name, "step") == [(step,) for step in range(1, 7)]
            lines = history(tmp_path / name, LOSS, GRAD_NORM, "sample_hash")
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


# ---- ranks that read the same rows


def test_rows_follow_data_rank_and_not_rank(tiny_args, held_out, monkeypatch, read_metrics):
    """Two processes that hold copies of one model and read the same rows log what one process does; so does a bad step."""
    poison(2, math.nan, monkeypatch)
    changes = {"total_steps": 3, "data.validation.v.path": held_out, "eval.interval_steps": 3}

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

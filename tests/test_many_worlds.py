"""Any number of processes goes on with what any other has saved; late writes of one rank delay, and never hang, the others."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from crash import run
from ranks import on_ranks

from olmo_train import train as module
from olmo_train.checkpoint import folders as checkpoint_folders
from olmo_train.checkpoint import save
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

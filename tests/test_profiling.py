"""Chosen steps are traced; running out of memory ends with what to change; garbage waits for the end of a step; a buffer that is
taken again costs no page faults."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import trained

from olmo_train import train
from olmo_train.log import profiling
from olmo_train.run import allocator, out_of_memory
from olmo_train.run.out_of_memory import OutOfMemoryError


def test_the_chosen_steps_are_traced_and_their_slowest_operations_listed(tiny_args):
    config = trained(tiny_args(**{"total_steps": 6, "profile.start_step": 3, "profile.steps": 2}))
    folder = Path(config.run_dir) / "profile"
    events = json.loads((folder / "rank-0000.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "optimizer" and event["ph"] == "X" for event in events) == 2
    table = (folder / "rank-0000.txt").read_text()
    assert "aten::mm" in table
    assert len([line for line in table.splitlines() if "::" in line or "forward" in line]) <= profiling.TABLE_ROWS


def test_a_run_that_ends_within_the_chosen_steps_leaves_a_trace(tiny_args):
    config = trained(tiny_args(**{"total_steps": 3, "profile.start_step": 3, "profile.steps": 5}))
    assert (Path(config.run_dir) / "profile" / "rank-0000.json").stat().st_size > 1000


def test_no_profiler_is_made_when_none_is_asked_for(tiny_args, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", None)
    config = trained(tiny_args(total_steps=2))
    assert not (Path(config.run_dir) / "profile").exists()


def test_running_out_of_memory_tells_what_to_change(tiny_args, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(OutOfMemoryError) as caught:
        next(train.train(tiny_args()))
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "micro_batch_size: CUDA out of memory. Tried to allocate 2.00 GiB; use a micro_batch_size below 4, or "
        "parallel.activation_checkpointing=selective or full, or more processes; `olmo-train plan` shows how much each takes"
    )


def test_a_cpu_that_runs_out_tells_it_too_and_other_errors_pass_through(tmp_path):
    with pytest.raises(OutOfMemoryError, match="^micro_batch_size: DefaultCPUAllocator: can't allocate memory"):  # noqa: SIM117
        with out_of_memory.explain_out_of_memory(tmp_path, 4, "none"):
            torch.empty(2**50)
    with pytest.raises(RuntimeError, match="^another$"), out_of_memory.explain_out_of_memory(tmp_path, 4, "none"):
        raise RuntimeError("another")


def test_a_micro_batch_of_one_that_is_recomputed_already_needs_more_processes():
    assert out_of_memory.ways_out(1, "full").startswith("use more processes;")
    assert out_of_memory.ways_out(1, "selective").startswith("use parallel.activation_checkpointing=full, or more processes;")


def test_garbage_is_held_during_a_run_and_let_go_after_it(tiny_args):
    run = train.train(tiny_args(total_steps=2))
    next(run)
    assert not gc.isenabled() and gc.get_freeze_count() > 0
    run.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_users_own_setting_of_the_gpus_allocator_comes_first(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    allocator.grow_gpu_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:128"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    allocator.grow_gpu_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


# ---- freed memory is kept

PROGRAM = """
import json, resource
import torch
from olmo_train.run import allocator

def faults():  # of ten rounds of taking and freeing 64 MB, after some in which the heap finds its size
    for round in range(40):
        if round == 30:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
kept = allocator.keep_freed_memory()
print(json.dumps([kept, before, faults()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc on Linux")
def test_a_buffer_that_is_taken_again_costs_no_page_faults():
    kept, before, after = json.loads(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True).stdout)
    assert kept
    assert before > 10 * 2**26 // 4096 / 2, "the plain allocator maps such a buffer again each time"
    assert after < 100


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()

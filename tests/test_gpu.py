"""What only a GPU can show; skipped where there is none. With REHEARSE_ON_CPU=1 the same lines run on the CPU."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from runs import GRAD_NORM, LOSS, history

from olmo_train import train as module
from olmo_train.run.out_of_memory import OutOfMemoryError
from olmo_train.train import train

REHEARSAL = "REHEARSE_ON_CPU" in os.environ
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="there is no GPU here")
slow_on_a_cpu = pytest.mark.skipif(REHEARSAL, reason="slow on a CPU")
WARM = 3  # steps after which everything has been set up
DOCUMENTS = {"data.document_mask": True, "data.eos_id": 511}
# Heads of 128 and several blocks of keys: then attention's backward sums parts of a gradient, in a fixed order or not.
WIDE = {"model.d_model": 256, "model.n_heads": 2, "model.mlp_hidden": 512, "model.seq_len": 1024, "parallel.precision": "bf16",
        "global_batch_size": 4, "micro_batch_size": 2, "total_steps": 5}  # fmt: skip


def figures(config) -> list[tuple]:
    return history(config.run_dir, LOSS, GRAD_NORM)


@pytest.fixture
def watched(monkeypatch):
    """From step WARM on, train_step raises where it would wait for the GPU; returns the steps that were watched."""
    steps, real = [], module.train_step

    def step(model, optimizer, batch, *rest):
        if batch.step <= WARM or not torch.cuda.is_available():
            return real(model, optimizer, batch, *rest)
        torch.cuda.set_sync_debug_mode("error")
        try:
            stats = real(model, optimizer, batch, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(batch.step)
        return stats

    monkeypatch.setattr(module, "train_step", step)
    return steps


@pytest.mark.parametrize(
    "precision, tolerance, changes",
    [
        ("fp32", 1e-4, {}),
        ("bf16", 1e-2, {}),
        ("fp32", 1e-4, {**DOCUMENTS, "model.n_kv_heads": 2, "model.tie_embeddings": True, "model.z_loss": 1e-4}),
        ("fp32", 1e-3, {"optim.name": "muon", "model.norm": "rms_norm"}),
    ],
)
def test_the_first_losses_are_those_of_the_cpu_in_fp32(tiny_args, tiny_words, run_cli, precision, tolerance, changes):
    changes = {**changes, "total_steps": 5}
    config, on_cpu = tiny_args("gpu", **{"parallel.precision": precision, **changes}), tiny_args("cpu", **changes)
    list(train(config))
    out = run_cli("train", *tiny_words("cpu", **changes), CUDA_VISIBLE_DEVICES="")
    assert out.returncode == 0, out.stderr
    for found, expected in zip(figures(config), figures(on_cpu), strict=True):
        assert found[0] == pytest.approx(expected[0], rel=tolerance)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow_on_a_cpu)])
def test_no_step_waits_for_the_gpu(tiny_args, watched, checkpointing, compiled):
    changes = {"parallel.compile": compiled, "parallel.activation_checkpointing": checkpointing}
    list(train(tiny_args(**changes, **{"parallel.precision": "bf16", "log.interval_steps": 4})))
    assert watched == list(range(WARM + 1, 13)) or REHEARSAL


@pytest.mark.parametrize("changes", [DOCUMENTS, {"optim.name": "muon"}, {"determinism": "run"}])
def test_nor_with(tiny_args, watched, changes):
    list(train(tiny_args(**{"parallel.precision": "bf16", "log.interval_steps": 4, "parallel.compile": False, **changes})))
    assert watched == list(range(WARM + 1, 13)) or REHEARSAL


@pytest.mark.parametrize(
    "changes",
    [
        {"determinism": "run"},
        {"determinism": "run", **DOCUMENTS},
        {"determinism": "run", "optim.name": "muon", "parallel.activation_checkpointing": "selective"},
        pytest.param({"determinism": "run", "parallel.compile": True}, marks=slow_on_a_cpu),
        {"determinism": "world"},
        {"determinism": "world", **DOCUMENTS},
    ],
)
def test_the_same_command_again_has_the_same_bits(tiny_args, changes):
    once, again = (tiny_args(name, **WIDE, **changes) for name in ("once", "again"))
    for config in (once, again):
        list(train(config))
    assert figures(once) == figures(again)


def test_world_has_the_same_bits_for_every_micro_batch(tiny_args):
    two, one = (tiny_args(f"{rows}", **{**WIDE, "determinism": "world", "micro_batch_size": rows}) for rows in (2, 1))
    for config in (two, one):
        list(train(config))
    assert figures(two) == figures(one)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow_on_a_cpu)])
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_losses_in_float8_are_near_those_in_bf16(tiny_args, compiled):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    changes = {**WIDE, "parallel.compile": compiled, "model.seq_len": 64}
    bf16, float8 = (tiny_args(str(value), **{**changes, "parallel.float8": value}) for value in (False, True))
    for config in (bf16, float8):
        list(train(config))
    for expected, found in zip(figures(bf16), figures(float8), strict=True):
        assert found[0] == pytest.approx(expected[0], rel=0.02)


def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu(tiny_args, tiny_words, run_cli):
    changes = {"optim.schedule_steps": 12}
    config = tiny_args("cut", **changes, total_steps=6)
    list(train(config))
    out = run_cli("train", *tiny_words("cut", **changes, total_steps=8), CUDA_VISIBLE_DEVICES="")
    assert out.returncode == 0, out.stderr
    whole = tiny_args("whole", **changes, total_steps=8)
    list(train(whole))
    for found, expected in zip(figures(config), figures(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs the memory of a GPU")
def test_out_of_memory_names_the_keys_that_help_and_writes_what_held_it(tiny_args):
    wide = {"model.vocab_size": 2**16, "model.padded_vocab_size": 2**16, "model.d_model": 512}  # 67 million parameters
    config = tiny_args(**wide)  # whose weights and moments take 0.8 GB
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(OutOfMemoryError, match="micro_batch_size"):
            list(train(config))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "allocated" in Path(config.run_dir, "forensics/out-of-memory/rank-0000.txt").read_text().lower()


def test_a_run_resumes_bit_for_bit(tiny_args):
    changes = {"determinism": "run", "parallel.precision": "bf16", "optim.schedule_steps": 12}
    whole, cut = tiny_args("whole", **changes), tiny_args("cut", **changes)
    list(train(whole))
    list(train(tiny_args("cut", **changes, total_steps=7)))
    list(train(cut))
    assert figures(cut) == figures(whole)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_not_waited_for(tiny_args, watched, monkeypatch):
    clip, step, kept = module.gradients.clip_gradients, module.train_step, {}

    def poisoned(model, max_norm, **options):
        if len(kept) == 1:  # the step whose weights before it were just taken
            gradient = next(model.parameters()).grad
            getattr(gradient, "_local_tensor", gradient).view(-1)[:1].fill_(float("nan"))
        return clip(model, max_norm, **options)

    def noting(model, optimizer, batch, *rest):
        weights = lambda: [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]  # noqa: E731
        if batch.step == 6:
            kept["before"] = weights()
        stats = step(model, optimizer, batch, *rest)
        if batch.step == 6:
            kept["after"] = weights()
        return stats

    monkeypatch.setattr(module.gradients, "clip_gradients", poisoned)
    monkeypatch.setattr(module, "train_step", noting)
    skipped = [stats.skipped.item() for stats in train(tiny_args())]
    assert skipped == [float(number == 6) for number in range(1, 13)]
    assert all(torch.equal(a, b) for a, b in zip(kept["before"], kept["after"], strict=True))
    assert 6 in watched or REHEARSAL

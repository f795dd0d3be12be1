"""What only a GPU can show; skipped where there is none. With REHEARSE_ON_CPU=1 the same lines run there on the CPU."""

import os

import pytest
import torch
from runs import GRAD_NORM, LOSS, history

from olmo_train import train as module
from olmo_train.train import train

REHEARSAL = "REHEARSE_ON_CPU" in os.environ
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="there is no GPU here")
WARM = 3  # steps after which everything has been set up


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


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_the_first_losses_are_those_of_the_cpu_in_fp32(tiny_args, tiny_words, run_cli, precision, tolerance):
    config, on_cpu = tiny_args("gpu", **{"parallel.precision": precision, "total_steps": 5}), tiny_args("cpu")
    list(train(config))
    out = run_cli("train", *tiny_words("cpu", total_steps=5), CUDA_VISIBLE_DEVICES="")
    assert out.returncode == 0, out.stderr
    for found, expected in zip(figures(config), figures(on_cpu), strict=True):
        assert found[0] == pytest.approx(expected[0], rel=tolerance)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(REHEARSAL, reason="slow on a CPU"))])
def test_no_step_waits_for_the_gpu(tiny_args, watched, checkpointing, compiled):
    changes = {"parallel.compile": compiled, "parallel.activation_checkpointing": checkpointing}
    list(train(tiny_args(**changes, **{"parallel.precision": "bf16", "log.interval_steps": 4})))
    assert watched == list(range(WARM + 1, 13)) or REHEARSAL


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

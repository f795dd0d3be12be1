"""A step that is not finite changes nothing on any rank; too many end the run; a signal ends it after a save, exactly."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import exit_code, fork, on_ranks
from runs import cut, events_of, history, trained, wait_for

from olmo_train import train as module
from olmo_train.__main__ import main
from olmo_train.checkpoint.folders import committed, read_state
from olmo_train.data import loader
from olmo_train.errors import NonFiniteError, Stopped
from olmo_train.guards.config import GuardConfig
from olmo_train.guards.nonfinite import check_skipped
from olmo_train.guards.signals import StopSignals, acknowledged_interrupt, counts_again, too_slow_to_stop
from olmo_train.parallel import processes
from olmo_train.train import train


def poison(step: int, value: float, monkeypatch=None, rank: int = 0, world=None, choice: random.Random | None = None):
    """From now on the gradient of update `step` holds `value`, in one element on one rank: in the first of blocks.1.mlp.w_down,
    or where `choice` picks one."""
    real, seen = module.gradients.clip_gradients, []

    def poisoned(model, max_norm, **options):
        seen.append(1)
        if len(seen) in (step if isinstance(step, tuple) else (step,)) and (world is None or world.rank == rank):
            parameters = model.parameters() if choice else [model.blocks[1].mlp.w_down.weight]
            shards = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters]
            shard = (choice or random).choice([shard for shard in shards if shard.numel()]).view(-1)
            shard[choice.randrange(len(shard)) if choice else 0] = value
        return real(model, max_norm, **options)

    if monkeypatch:
        monkeypatch.setattr(module.gradients, "clip_gradients", poisoned)
    else:
        module.gradients.clip_gradients = poisoned


def states_of(run_dir, step) -> dict:
    """The tensors of a checkpoint, whole, and its count of updates."""
    import torch.distributed.checkpoint as dcp

    from olmo_train.checkpoint.format import open_reader

    folder = Path(run_dir) / "checkpoints" / f"step-{step:07d}"
    entries = open_reader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in entries.items()}
    dcp.load(tensors, storage_reader=open_reader(folder), no_dist=True)
    return tensors | {"updates": torch.tensor(read_state(folder)["optimizer_steps"])}


def unchanged(run_dir, before: int, after: int) -> bool:
    a, b = states_of(run_dir, before), states_of(run_dir, after)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


EVERY = {"checkpoint.interval_steps": 1, "checkpoint.keep_last": 20, "total_steps": 6}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing_and_training_continues(tiny_args, read_metrics, monkeypatch, value):
    poison(4, value, monkeypatch)
    config = tiny_args("run", **EVERY)
    skipped = [stats.skipped.item() for stats in train(config)]
    assert skipped == [0, 0, 0, 1, 0, 0]
    assert unchanged(config.run_dir, 3, 4) and not unchanged(config.run_dir, 2, 3) and not unchanged(config.run_dir, 4, 5)
    assert states_of(config.run_dir, 6)["updates"] == 5
    assert [line["skipped"] for line in read_metrics(config.run_dir)] == [0, 0, 0, 1, 0, 0]
    assert all(torch.isfinite(tensor).all() for tensor in states_of(config.run_dir, 6).values())


def test_a_loss_that_is_not_finite_changes_nothing(tiny_args, read_metrics, monkeypatch):
    """Also where its gradient is finite."""
    real, calls = module.Transformer.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        losses = real(self, *args, **kwargs)
        return losses + (torch.tensor([math.nan, 0, 0, 0]) if len(calls) == 7 else 0)  # two micro-batches a step

    monkeypatch.setattr(module.Transformer, "forward", forward)
    config = tiny_args("run", **EVERY)
    assert [stats.skipped.item() for stats in train(config)] == [0, 0, 0, 1, 0, 0]
    assert unchanged(config.run_dir, 3, 4)
    lines = read_metrics(config.run_dir)
    assert lines[3]["train/CrossEntropyLoss"] is None and all(line["train/CrossEntropyLoss"] for line in lines[:3] + lines[4:])


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_value_on_one_of_two_ranks_is_skipped_on_both(tiny_args, read_metrics, value):
    config = tiny_args("run", **EVERY)

    def run(world):
        poison(4, value, rank=1, world=world)
        return [[stats.skipped.item(), stats.grad_norm.isfinite().item()] for stats in train(config, world)]

    first, second = on_ranks(2, run)
    assert first == second == [[0.0, True]] * 3 + [[1.0, False]] + [[0.0, True]] * 2
    assert unchanged(config.run_dir, 3, 4) and not unchanged(config.run_dir, 4, 5)
    assert states_of(config.run_dir, 6)["updates"] == 5
    assert [line["skipped"] for line in read_metrics(config.run_dir)] == [0, 0, 0, 1, 0, 0]
    assert read_metrics(config.run_dir)[3]["optim/total_grad_norm"] is None


@pytest.mark.slow
def test_in_50_seeds_no_checkpoint_holds_what_is_not_finite(tiny_args):
    """Whatever the value, the element, the rank and the step."""
    for seed in range(50):
        choice = random.Random(seed)
        ranks, step, value = choice.choice((1, 2)), choice.randint(1, 6), choice.choice((math.nan, math.inf, -math.inf, 1e30))
        config, rank = tiny_args(f"run-{seed}", seed=seed, **EVERY), choice.randrange(ranks)

        def run(world):
            poison(step, value, None, rank, world, random.Random(seed))  # noqa: B023
            return [stats.step for stats in train(config, world) if stats.skipped]  # noqa: B023

        assert on_ranks(ranks, run) == [[step]] * ranks, (seed, ranks, step, rank, value)
        assert list(committed(Path(config.run_dir))) == [1, 2, 3, 4, 5, 6]
        for saved in range(1, 7):
            tensors = states_of(config.run_dir, saved)
            assert len(tensors) > 20 and all(torch.isfinite(t).all() for t in tensors.values()), (seed, saved)


def mask_steps(steps: tuple[int, ...]):
    """From now on no label of these steps is scored."""
    real = loader.read_batch

    def masked(mixture, step, rank, world_size):
        batch = real(mixture, step, rank, world_size)
        return replace(batch, labels=torch.full_like(batch.labels, loader.IGNORE)) if step in steps else batch

    return masked


@pytest.mark.parametrize("divisor", ["scored_tokens", "all_tokens"])
def test_a_batch_without_a_scored_token_changes_nothing_and_is_counted(
    tiny_args, read_metrics, monkeypatch, caplog, capsys, divisor
):
    monkeypatch.setattr(loader, "read_batch", mask_steps((3, 4, 5)))
    config = tiny_args("run", **EVERY, loss_divisor=divisor, **{"guards.max_skipped": 2})
    assert [stats.skipped.item() for stats in train(config)] == [0, 0, 1, 1, 1, 0]
    assert unchanged(config.run_dir, 2, 5) and states_of(config.run_dir, 6)["updates"] == 3
    lines = read_metrics(config.run_dir)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 0] and not any(line["spike"] for line in lines)
    assert [line["train/CrossEntropyLoss"] is None for line in lines] == [False, False, True, True, True, False]
    assert "loss nan" not in capsys.readouterr().out
    assert [r.levelname for r in caplog.records if "no scored token in this batch" in r.getMessage()] == ["WARNING"]
    skips = {event["step"]: event["why"] for event in events_of(config.run_dir, "skip")}
    assert skips == dict.fromkeys((3, 4, 5), "no scored token in this batch")
    assert read_state(committed(Path(config.run_dir))[6])["spikes"]["seen"] == 3  # the detector has not seen them


def test_two_ranks_agree_on_a_batch_without_a_scored_token_and_step_when_one_has_some(tiny_args):
    """Rank 1 has none in step 4, neither rank in step 3."""

    def run(world):
        loader.read_batch = mask_steps((3, 4) if world.rank else (3,))
        return [stats.skipped.item() for stats in train(tiny_args("run", **EVERY), world)]

    assert on_ranks(2, run) == [[0, 0, 1, 0, 0, 0]] * 2


def test_an_unscored_batch_neither_lengthens_nor_ends_a_row_of_skipped_steps(tiny_args, monkeypatch):
    monkeypatch.setattr(loader, "read_batch", mask_steps((4,)))
    poison((3, 5), math.nan, monkeypatch)
    config = tiny_args("run", **EVERY, **{"guards.max_skipped": 2})
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        list(train(config))


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint_named(tiny_args, monkeypatch):
    poison((3, 5, 6, 7), math.nan, monkeypatch)
    config = tiny_args("run", **EVERY | {"total_steps": 12, "guards.max_skipped": 3, "checkpoint.async_save": False})
    seen = []
    with pytest.raises(NonFiniteError, match=r"guards.max_skipped: 3 steps in a row .*step-0000006") as caught:
        seen += [stats.step for stats in train(config)]
    assert caught.value.exit_code == 5
    assert unchanged(config.run_dir, 4, 6)


def test_a_row_of_skipped_steps_is_counted_over_a_resume(tiny_args, monkeypatch):
    changes = {"guards.max_skipped": 4, "checkpoint.interval_steps": 1, "log.interval_steps": 2}
    poison((3, 4, 5), math.nan, monkeypatch)
    trained(tiny_args("run", total_steps=5, **changes))
    poison(1, math.nan, monkeypatch)
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        trained(tiny_args("run", **changes))


def test_the_limit_is_exact():
    check_skipped(9, GuardConfig(max_skipped=10), None)
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet"):
        check_skipped(10, GuardConfig(max_skipped=10), None)


def test_a_poisoned_run_ends_with_exit_code_5(run_main, tiny_words, tmp_path):
    """Weights that a step has made infinite have no finite loss again."""
    done = run_main("train", *tiny_words("run", **{"optim.peak_lr": 1e38, "guards.max_skipped": 3}))
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("error: guards.max_skipped: 3 steps in a row")
    assert "Traceback" not in done.stderr and committed(tmp_path / "run") == {}


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_a_save_and_it_resumes_exactly(tiny_words, tiny_args, tmp_path, read_metrics, number):
    changes = {"total_steps": 200, "checkpoint.interval_steps": 1000}
    run = fork(lambda: main(["train", *tiny_words("run", **changes)]), tmp_path / "stderr")
    wait_for(tmp_path / "run", 5)
    os.kill(run, number)
    assert exit_code(run) == 75
    (step,) = committed(tmp_path / "run")
    assert (tmp_path / "stderr").read_text().splitlines()[-1] == (
        f"stopped: {signal.Signals(number).name}: saved after step {step} of 200; run the same command again to resume"
    )
    assert [event["event"] for event in events_of(tmp_path / "run")] == ["start", "signal", "save"]
    assert len(read_metrics(tmp_path / "run")) == step  # no step was lost and none begun
    for name in ("run", "whole"):
        cut(tiny_args(name, **changes), steps=step + 3)
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_a_signal_to_one_rank_stops_both_after_the_same_step_and_rank_0_acknowledges_it(tiny_args, capfd):
    config = tiny_args("run", total_steps=100, **{"checkpoint.interval_steps": 1000})

    def run(world):
        try:
            for stats in train(config, world):
                if stats.step == 4 and world.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
        except Stopped as stopped:
            return [stats.step, stopped.exit_code, str(stopped)]

    first, second = on_ranks(2, run)
    assert capfd.readouterr().err.count("SIGTERM on another rank: saving after step 4\n") == 1
    assert first == second == [4, 75, "SIGTERM: saved after step 4 of 100; run the same command again to resume"]
    assert list(committed(Path(config.run_dir))) == [4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handlers_of_before_come_back(number):
    before = signal.getsignal(number)
    with StopSignals().installed() as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) is before


def test_a_signal_to_torchrun_stops_both_processes_after_a_save(tiny_words, tmp_path, read_metrics):
    words = tiny_words("run", total_steps=2000, **{"checkpoint.interval_steps": 5000})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "olmo_train", "train"]
    launched = subprocess.Popen([*torchrun, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(tmp_path / "run", 3)
    launched.send_signal(signal.SIGTERM)
    _, stderr = launched.communicate(timeout=60)
    assert launched.returncode != 0 and stderr.count("stopped: SIGTERM: saved after step") == 1
    assert stderr.count("SIGTERM: finishing step") == 1 and "error: " not in stderr
    (step,) = committed(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == step


@pytest.fixture
def torchrun_source(monkeypatch, tmp_path):
    """torchrun_source(text): what processes.py finds in the source of the installed torchrun."""

    def source(text: str) -> None:
        (tmp_path / "torch/distributed/launcher").mkdir(parents=True)
        (tmp_path / "torch/distributed/launcher/api.py").write_text(text)
        found = SimpleNamespace(origin=str(tmp_path / "torch/__init__.py"))
        monkeypatch.setattr(processes, "find_spec", lambda name: found)

    return source


def test_a_save_longer_than_torchruns_shutdown_timeout_is_a_warning(monkeypatch, torchrun_source):
    torchrun_source("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    line = {"throughput/step_seconds": 10, "throughput/checkpoint_write_seconds": 50}
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert too_slow_to_stop(line) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert too_slow_to_stop({}) is None and too_slow_to_stop(line | {"throughput/checkpoint_write_seconds": 19}) is None
    warning = too_slow_to_stop(line)
    assert "take 60 s" in warning and "30 s after" in warning and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120" in warning
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    assert too_slow_to_stop(line) is None
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")  # as the launcher of this package
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    assert too_slow_to_stop(line) is None


def test_a_torchrun_that_does_not_read_its_timeout_is_told_before_the_first_step(tiny_args, monkeypatch, caplog, torchrun_source):
    torchrun_source("close(timeout=30)")  # that of torch 2.11
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "170")
    cut(tiny_args("run"), steps=1)
    assert "torchrun kills the run 30 s after a signal, because that of torch 2." in caplog.text
    assert "does not read TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170; start it with `python -m olmo_train.parallel.launch`" in caplog.text


def test_a_run_says_so_once_when_its_saves_are_too_slow_for_torchrun(tiny_args, monkeypatch, caplog, torchrun_source):
    torchrun_source("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    config = tiny_args("run", **{"checkpoint.interval_steps": 2, "checkpoint.async_save": False})
    cut(config, steps=6)
    assert caplog.text.count("a signal would lose steps") == 1
    caplog.clear()
    cut(config, steps=7)  # a resumed run knows it before its first save
    assert caplog.text.count("a signal would lose steps") == 1


def test_signals_are_answered_while_the_main_thread_computes_in_c_and_a_second_one_leaves_at_once():
    program = (
        "import hashlib\nfrom olmo_train.guards.signals import StopSignals\nwith StopSignals().installed() as signals:\n"
        "    signals.step = 12\n    print('ready', flush=True)\n    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGINT)
    assert run.stderr.readline() == "SIGINT: finishing step 12, then saving; Ctrl-C again to leave at once\n"
    run.send_signal(signal.SIGINT)  # the same Ctrl-C, from a launcher
    run.send_signal(signal.SIGTERM)
    time.sleep(2.1)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=10) == ("", "SIGINT again: leaving without saving\n")
    assert run.returncode == 128 + signal.SIGINT


def test_ctrl_c_is_acknowledged_while_a_verb_computes_in_c_and_a_second_one_leaves():
    program = (
        "import argparse, hashlib, signal\nfrom olmo_train.__main__ import _run\nsignal.alarm(60)\n"
        "def verb(arguments):\n    print('ready', flush=True)\n    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
        "_run(verb, argparse.Namespace(verb='plan', debug=False))"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it is in C
    run.send_signal(signal.SIGINT)
    assert run.stderr.readline() == "SIGINT: stopping; Ctrl-C again to leave at once\n"
    time.sleep(1.5)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=10) == ("", "") and run.returncode == 128 + signal.SIGINT


def test_a_verb_that_stops_at_once_needs_no_acknowledgement(capfd):
    with pytest.raises(KeyboardInterrupt), acknowledged_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert capfd.readouterr().err == "" and signal.set_wakeup_fd(-1) == -1


def test_a_signal_before_the_first_step_says_that_the_run_saves(capfd):
    with StopSignals().installed():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    assert capfd.readouterr().err == "SIGTERM: still starting; will save and stop\n"


def test_only_late_signals_count_twice():
    assert [counts_again(signal.SIGINT, seconds) for seconds in (0.1, 1.9, 2.1)] == [False, False, True]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        assert [counts_again(number, seconds) for seconds in (0.1, 9.9, 10.1)] == [False, False, True]


def test_signals_to_a_forked_child_are_not_this_process_own():
    with StopSignals().installed() as signals:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.2)
        assert not signals.received


def test_a_run_that_hangs_ends_with_exit_code_6_and_leaves_its_stacks(tmp_path):
    program = (
        "import sys, time, pathlib\nfrom olmo_train.guards.watchdog import Watchdog\nfolder = pathlib.Path(sys.argv[1])\n"
        "dog = Watchdog(0.4, folder, folder / 'beats', rank=0)\n"
        "for step in range(8):\n    time.sleep(0.1)\n    dog.heartbeat(step)\n"
        "def stuck():\n    time.sleep(60)\nstuck()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 6
    stacks = tmp_path / "forensics" / "hang" / "rank-0000.txt"
    assert re.fullmatch(
        r"error: guards.hang_seconds: no progress for 0.[45]\d* s after step 7; rank 0: hangs, after step 7 .*; "
        rf"stacks and last batches of all ranks are in {stacks.parent}; run the same command again",
        done.stderr.splitlines()[-1],
    )
    assert "in stuck" in stacks.read_text()

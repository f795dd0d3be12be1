"""The same command again goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from crash import signal_in_evaluation

from olmo_train.errors import ConfigError, Stopped
from olmo_train.history import History
from olmo_train.train import train

SAME = ("step", "train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate_group0", "optim/clipping_rate",
        "sample_hash", "skipped", "throughput/total_tokens", "throughput/total_flops")  # fmt: skip


def trained(config):
    for _ in train(config):
        pass
    return config


def cut(config, steps):
    """Train some steps and drop the run, as a kill between two steps would."""
    run = train(config)
    for stats in run:
        if stats.step == steps:
            run.close()
    return config


@pytest.fixture
def history(read_metrics):
    return lambda config: [tuple(line[name] for name in SAME) for line in read_metrics(config.run_dir)]


@pytest.fixture
def evaluated(tmp_path, tiny_tokens):
    """The changes to a run that evaluates every four steps, on 11 batches."""
    held_out = tmp_path / "held-out.npy"
    held_out.write_bytes(tiny_tokens.read_bytes()[: 2 * 44 * 64 + 2])
    return {"eval.interval_steps": 4, "data.validation.v.path": held_out}


def test_killed_after_a_checkpoint_a_run_resumes_bit_for_bit(tiny_args, tiny_words, tmp_path, history):
    whole = trained(tiny_args("whole"))
    command = [sys.executable, "-m", "olmo_train", "train", *tiny_words("killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoints" / "step-0000005").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = trained(tiny_args("killed"))
    assert history(again) == history(whole)
    events = [json.loads(line) for line in (tmp_path / "killed" / "events.jsonl").read_text().splitlines()]
    resumed = [event for event in events if event["event"] == "resume"]
    assert resumed and resumed[0]["step"] in (5, 10)


def test_stopped_in_the_middle_of_an_interval_a_run_logs_the_same_lines(tiny_args, history):
    changes = {"log.interval_steps": 4, "checkpoint.interval_steps": 5}
    whole = trained(tiny_args("whole", **changes))
    cut(tiny_args("cut", **changes), steps=7)
    assert history(trained(tiny_args("cut", **changes))) == history(whole)
    assert [line[0] for line in history(whole)] == [4, 8, 12]


def test_a_run_resumes_on_another_number_of_processes(tiny_args, tiny_words, run_cli, read_metrics, tmp_path):
    whole = trained(tiny_args("whole"))
    cut(tiny_args("cut"), steps=6)
    done = run_cli("train", *tiny_words("cut"), nproc=2)
    assert done.returncode == 0, done.stderr
    one, two = read_metrics(whole.run_dir), read_metrics(tmp_path / "cut")
    assert [line["world_size"] for line in two] == [1] * 5 + [2] * 7
    assert [line["sample_hash"] for line in one] == [line["sample_hash"] for line in two]
    assert max(abs(a["train/CrossEntropyLoss"] / b["train/CrossEntropyLoss"] - 1) for a, b in zip(one, two, strict=True)) < 1e-6
    trained(tiny_args("cut", total_steps=14))  # and back on one
    assert [line["world_size"] for line in read_metrics(tmp_path / "cut")][12:] == [1, 1]


def is_no_op(config):
    """Whether training again changes no file of the run."""

    def files():
        return {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}

    before = files()
    trained(config)
    return files() == before


def test_a_finished_run_is_a_no_op(tiny_args):
    assert is_no_op(trained(tiny_args("run")))


def test_a_longer_run_goes_on_with_the_same_batches(tiny_args, read_metrics, tmp_path):
    trained(tiny_args("run", total_steps=6))
    trained(tiny_args("run", total_steps=9))
    trained(tiny_args("whole", total_steps=9))
    hashes = [[line["sample_hash"] for line in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 9


def test_a_warmup_that_fills_the_run_and_a_jump_of_the_learning_rate_are_warnings(tiny_args, caplog):
    trained(tiny_args("run", total_steps=4))
    assert "optim.warmup_steps 4 fills all 4 steps" in caplog.text and "jumps" not in caplog.text
    caplog.clear()
    trained(tiny_args("run", total_steps=10))
    assert "the learning rate jumps from 0.0003 at step 4 to 0.00255 at step 5" in caplog.text and "fills all" not in caplog.text


@pytest.mark.parametrize("order", ["permute", "olmo"])
def test_after_a_change_of_the_batch_every_figure_counts_the_instances_that_were_read(tiny_args, read_metrics, order):
    words = {"total_tokens": (5 * 8 + 7 * 4) * 64, "total_steps": None, "log.interval_steps": 3, "data.order": order}
    cut(tiny_args("run", **words), steps=6)
    smaller = {"global_batch_size": 4, "allow_changes": "[global_batch_size]"}
    cut(tiny_args("run", **words, **smaller), steps=7)
    trained(tiny_args("run", **words, **smaller))
    lines, inspected = read_metrics(tiny_args("run").run_dir), History(Path(tiny_args("run").run_dir))
    tokens = {step: (5 * 8 + (step - 5) * 4) * 64 for step in (6, 9, 12)}
    assert {line["step"]: line["throughput/total_tokens"] for line in lines} == {3: 3 * 8 * 64, **tokens}
    a_token = lines[0]["throughput/total_flops"] / (3 * 8 * 64)
    assert all(line["throughput/total_flops"] == a_token * line["throughput/total_tokens"] for line in lines)
    assert lines[-1]["train/source/a/epoch"] == pytest.approx(68 / (40_000 // 64), abs=2e-3)
    mixtures = {step: inspected.attempt_of(step).mixture() for step in range(1, inspected.steps + 1)}
    read = [instance for step, mixture in mixtures.items() for instance in mixture.global_batch(step).instance.tolist()]
    assert read == mixtures[1].order.at(np.arange(68)).instance.tolist()  # none twice, none left out
    assert all(
        mixtures[s].sample_hash(mixtures[s].global_batch(s)) == line["sample_hash"] for line in lines for s in [line["step"]]
    )


CHANGES = [("optim.peak_lr", 1e-3, "0.003"), ("seed", 4, "3"), ("global_batch_size", 16, "8"),
           ("parallel.precision", "bf16", "fp32"), ("model.rope_theta", 500, "10000")]  # fmt: skip


@pytest.mark.parametrize("key, value, was", CHANGES)
def test_a_change_of_the_training_is_refused_with_both_values_unless_allowed(tiny_args, key, value, was):
    trained(tiny_args("run", total_steps=2))
    with pytest.raises(ConfigError, match=f"{key}.*{value}.*{was}"):
        trained(tiny_args("run", total_steps=3, **{key: value}))
    trained(tiny_args("run", total_steps=3, allow_changes=f"[{key}]", **{key: value}))


def test_sources_in_another_order_are_refused(tiny_args, tiny_words, tiny_tokens):
    """The order decides which place of the mix is whose."""
    from olmo_train import config
    from olmo_train.train_config import TrainConfig

    other = f"data.sources.b.path={tiny_tokens}"
    words = tiny_words("run", total_steps=2)
    trained(config.load(TrainConfig, [], [*words, other]))
    with pytest.raises(ConfigError, match=r"data.sources: is \['b', 'a'\] now and was \['a', 'b'\]"):
        trained(config.load(TrainConfig, [], [other, *words, "total_steps=3"]))


def test_the_speed_after_a_resume_counts_the_steps_of_this_process_alone(tiny_args, monkeypatch):
    from olmo_train.log import journal as module

    changes = {"log.interval_steps": 10, "checkpoint.interval_steps": 5}
    cut(tiny_args("run", **changes), steps=6)
    timed, real = [], module.throughput_metrics
    monkeypatch.setattr(module, "throughput_metrics", lambda **known: timed.append(known["steps"]) or real(**known))
    trained(tiny_args("run", **changes))
    assert timed == [5, 2]


def test_data_changed_at_the_same_size_are_refused(tiny_args, tiny_tokens):
    trained(tiny_args("run", total_steps=2))
    content = bytearray(tiny_tokens.read_bytes())
    content[1000:1002], content[1002:1004] = content[1002:1004], content[1000:1002]
    tiny_tokens.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.sources\.a.*differs from the data"):
        trained(tiny_args("run", total_steps=3))
    trained(tiny_args("run", total_steps=3, allow_changes="[data.sources.a]"))


def test_moved_data_of_the_same_contents_are_accepted(tiny_args, tiny_tokens):
    trained(tiny_args("run", total_steps=2))
    moved = tiny_tokens.rename(tiny_tokens.with_name("moved.npy"))
    trained(tiny_args("run", total_steps=3, **{"data.sources.a.path": moved}))


def test_a_signal_during_training_and_during_evaluation_changes_no_line(tiny_args, evaluated, read_metrics, history):
    """Stopped in the last evaluation, too: the resumed run does it again, once, and each step stands once."""
    whole = trained(tiny_args("whole", **evaluated))
    config = tiny_args("run", **evaluated)
    # The second evaluation of a resumed run is the next one: its first makes up for the one that was interrupted.
    stops = [stop_in_evaluation(config, number) for number in (1, 1, 2, 1, 2, 1)]
    assert stops == [4, 4, 8, 8, 12, 12]
    trained(config)
    assert history(config) == history(whole)
    losses = [[line.get("eval/v/CrossEntropyLoss") for line in read_metrics(c.run_dir)] for c in (whole, config)]
    assert losses[0] == losses[1] and sum(loss is not None for loss in losses[0]) == 3
    assert is_no_op(config)


def test_killed_after_a_made_up_evaluation_a_run_logs_its_step_once(tiny_args, evaluated, history):
    changes = evaluated | {"checkpoint.interval_steps": 100, "total_steps": 8}
    whole = trained(tiny_args("whole", **changes))
    assert stop_in_evaluation(tiny_args("run", **changes), 1) == 4
    cut(tiny_args("run", **changes), steps=6)
    assert history(trained(tiny_args("run", **changes))) == history(whole)


def test_a_branch_does_not_log_the_step_that_its_parent_owes(tiny_args, evaluated, read_metrics, tmp_path):
    changes = evaluated | {"total_steps": 6}
    assert stop_in_evaluation(tiny_args("run", **changes), 1) == 4
    branch = trained(tiny_args("branch", resume_from=tmp_path / "run", **changes))
    assert [line["step"] for line in read_metrics(branch.run_dir)] == [5, 6]


def test_a_signal_before_the_first_step_of_a_resumed_run_saves_nothing_again(tiny_args, tmp_path):
    cut(tiny_args("run"), steps=6)
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    before = folder.stat().st_ino
    run = train(tiny_args("run"))
    with pytest.raises(Stopped, match="stopped after step 5 of 12 and saved"), signal_at_the_first_batch():
        next(run)
    assert folder.stat().st_ino == before


def test_a_line_of_an_evaluation_alone_tells_where_it_comes_from(tiny_args):
    path = tiny_args("x").data.sources["a"].path
    config = trained(tiny_args("run", **{"eval.interval_steps": 3, "log.interval_steps": 4, "data.validation.v.path": path}))
    with open(f"{config.run_dir}/metrics.jsonl") as file:
        lines = {line["step"]: line for line in map(json.loads, file)}
    assert list(lines) == [3, 4, 6, 8, 9, 12]
    assert all(line.keys() >= {"sample_hash", "skipped", "attempt", "world_size"} for line in lines.values())
    assert "train/CrossEntropyLoss" not in lines[3] and "eval/v/CrossEntropyLoss" in lines[3]


def stop_in_evaluation(config, number):
    """Train, and send SIGTERM to this process in the middle of its evaluation `number`; the step that it stops at."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="and saved") as stopped:
        signal_in_evaluation(number, patch.setattr)
        trained(config)
    return int(stopped.value.what.split()[3])


@contextmanager
def signal_at_the_first_batch():
    from olmo_train.data.loader import Loader

    def get(self, give_up):
        os.kill(os.getpid(), signal.SIGTERM)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "get", get)
        yield


def test_two_runs_cannot_share_a_run_dir(tiny_args, tiny_words, run_cli):
    run = train(tiny_args("run"))
    next(run)
    other = run_cli("train", *tiny_words("run"))
    assert other.returncode == 2 and f"in use by process {os.getpid()}" in other.stderr.splitlines()[-1]
    run.close()
    trained(tiny_args("run", total_steps=3))  # the lock ended with its holder


def test_a_branch_goes_on_in_a_run_dir_of_its_own(tiny_args, read_metrics, tmp_path):
    trained(tiny_args("trunk", total_steps=10))
    folder = tmp_path / "trunk" / "checkpoints" / "step-0000005"
    branch = {"total_steps": 10, "resume_from": folder}
    trained(tiny_args("same", **branch))
    trained(tiny_args("other", **branch, **{"data.seed": 9, "optim.peak_lr": 1e-3}))
    trunk, same, other = (read_metrics(tmp_path / name) for name in ("trunk", "same", "other"))
    assert [[line[name] for name in SAME] for line in same] == [[line[name] for name in SAME] for line in trunk[5:]]
    assert other[0]["step"] == 6 and other[0]["sample_hash"] != trunk[5]["sample_hash"]


def test_init_from_takes_weights_alone(tiny_args, read_metrics, tmp_path):
    trained(tiny_args("trunk", total_steps=10, **{"optim.warmup_steps": 1}))
    trained(tiny_args("warm", total_steps=2, init_from=tmp_path / "trunk", **{"optim.warmup_steps": 1}))
    trunk, warm = read_metrics(tmp_path / "trunk"), read_metrics(tmp_path / "warm")
    assert [line["step"] for line in warm] == [1, 2] and warm[0]["sample_hash"] == trunk[0]["sample_hash"]
    assert warm[0]["train/CrossEntropyLoss"] < trunk[0]["train/CrossEntropyLoss"] - 0.05

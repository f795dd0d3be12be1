"""The same command resumes as if the run had not stopped."""

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from crash import signal_in_evaluation
from data_sources import contents
from ranks import exit_code, fork
from runs import LOSS, cut, first_quick, history, lines_of, trained, trained_on, wait_for

from olmo_train import config as configuration
from olmo_train.__main__ import main
from olmo_train.errors import ConfigError, Stopped
from olmo_train.history import History
from olmo_train.run.resume import check_changes
from olmo_train.train import train


@pytest.fixture
def evaluated(held_out):
    """The changes to a run that evaluates every four steps, on 11 batches."""
    return {"eval.interval_steps": 4, "data.validation.v.path": held_out}


def test_stopped_in_the_middle_of_an_interval_a_run_logs_the_same_lines(tiny_args):
    changes = {"log.interval_steps": 4, "checkpoint.interval_steps": 5}
    whole = trained(tiny_args("whole", **changes))
    cut(tiny_args("cut", **changes), steps=7)
    assert history(trained(tiny_args("cut", **changes)).run_dir) == history(whole.run_dir)
    assert history(whole.run_dir, "step") == [(4,), (8,), (12,)]


def test_a_run_resumes_on_another_number_of_processes(tiny_args, read_metrics, tmp_path):
    whole = trained(tiny_args("whole"))
    config = cut(tiny_args("cut"), steps=6)
    trained_on(2, config)
    one, two = read_metrics(whole.run_dir), read_metrics(tmp_path / "cut")
    assert [line["world_size"] for line in two] == [1] * 5 + [2] * 7
    assert [line["sample_hash"] for line in one] == [line["sample_hash"] for line in two]
    assert max(abs(a["train/CrossEntropyLoss"] / b["train/CrossEntropyLoss"] - 1) for a, b in zip(one, two, strict=True)) < 1e-6
    trained(tiny_args("cut", total_steps=14))  # and back on one
    assert [line["world_size"] for line in read_metrics(tmp_path / "cut")][12:] == [1, 1]


def is_no_op(config):
    """Whether training again changes no file of the run."""
    before = contents(Path(config.run_dir))
    trained(config)
    return contents(Path(config.run_dir)) == before


def test_a_finished_run_is_a_no_op(tiny_args):
    assert is_no_op(trained(tiny_args("run")))


def test_a_longer_run_continues_with_the_same_batches(tiny_args, read_metrics, tmp_path):
    trained(tiny_args("run", total_steps=6))
    trained(tiny_args("run", total_steps=9))
    trained(tiny_args("whole", total_steps=9))
    hashes = [[line["sample_hash"] for line in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 9


def test_a_schedule_in_tokens_is_the_one_in_steps_also_after_a_resume(tiny_args, tmp_path):
    wsd = {"optim.schedule": "wsd", "optim.decay_shape": "1-sqrt", "total_steps": None, "total_tokens": 12 * 512}
    steps = trained(tiny_args("steps", **wsd, **{"optim.warmup_steps": 3, "optim.decay_steps": 5}))
    tokens = {"optim.warmup_steps": None, "optim.warmup_tokens": 3 * 512, "optim.decay_tokens": 5 * 512 - 100}
    cut(tiny_args("tokens", **wsd, **tokens), steps=9)
    trained(tiny_args("tokens", **wsd, **tokens))
    assert history(steps.run_dir) == history(tmp_path / "tokens")
    rates = [rate for (rate,) in history(steps.run_dir, "optim/learning_rate_group0")]
    assert rates[2:7] == [3e-3] * 5 and rates[7:] == sorted(rates[7:], reverse=True) and rates[-1] == pytest.approx(3e-4)
    saved = yaml.safe_load((tmp_path / "tokens/config.yaml").read_text())["optim"]
    assert (saved["warmup_tokens"], saved["decay_tokens"], saved["decay_steps"]) == (1536, 2460, None)


def test_a_decay_branch_of_a_stable_run_is_the_straight_run_of_its_length(tiny_args, tmp_path):
    wsd = {"optim.schedule": "wsd", "optim.decay_steps": 2, "total_steps": 8}
    trained(tiny_args("stable", **wsd | {"total_steps": 10}))
    trained(tiny_args("branch", **wsd, resume_from=tmp_path / "stable/checkpoints/step-0000005"))
    assert history(tmp_path / "branch") == history(trained(tiny_args("straight", **wsd)).run_dir)[5:]


def test_a_warmup_that_fills_the_run_and_a_jump_of_the_learning_rate_are_warnings(tiny_args, caplog):
    trained(tiny_args("run", total_steps=4))
    assert "optim.warmup_steps 4 fills the whole run of 4 steps" in caplog.text and "jumps" not in caplog.text
    caplog.clear()
    trained(tiny_args("run", total_steps=10))
    assert (
        "the learning rate jumps from 0.0003 at step 4 to 0.00255 at step 5" in caplog.text
        and "fills the whole run" not in caplog.text
    )


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


def test_a_batch_that_is_not_set_is_that_of_the_resumed_checkpoint(tiny_args, tmp_path, capsys):
    trained(tiny_args("run", total_steps=2))
    unset = {"global_batch_size": None, "total_steps": 4}
    assert tiny_args("run", **unset).global_batch_size == 64
    trained(tiny_args("run", **unset))
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["global_batch_size"] == 8
    trained(tiny_args("branch", resume_from=tmp_path / "run/checkpoints/step-0000002", **unset))
    assert history(tmp_path / "branch") == history(tmp_path / "run")[2:]
    assert "global_batch_size is not set" not in capsys.readouterr().out
    cut(tiny_args("new", **unset | {"global_batch_size": "null", "model.seq_len": 1024}), steps=1)
    assert "global_batch_size is not set: 4 instances, 4,096 tokens per step" in capsys.readouterr().out


def test_a_micro_batch_that_does_not_divide_the_rows_is_lowered_and_kept_in_the_configuration(tiny_args, tmp_path, capsys):
    alone = trained(tiny_args("one", micro_batch_size=4, total_steps=3))
    capsys.readouterr()
    two = trained_on(2, tiny_args("two", micro_batch_size=3, total_steps=3))  # 4 rows on each process: 2 at a time
    assert yaml.safe_load((tmp_path / "two/config.yaml").read_text())["micro_batch_size"] == 3
    assert np.array(history(two.run_dir, LOSS)) == pytest.approx(np.array(history(alone.run_dir, LOSS)), abs=1e-6)
    trained(tiny_args("two", micro_batch_size=3, total_steps=4))
    assert "micro_batch_size 3 is lowered to 2, which divides the 8 instances of a process" in capsys.readouterr().out


CHANGES = [("optim.peak_lr", 1e-3, "0.003"), ("seed", 4, "3"), ("global_batch_size", 16, "8"),
           ("parallel.precision", "bf16", "fp32"), ("model.rope_theta", 500, "10000")]  # fmt: skip


@pytest.mark.parametrize("key, value, was", first_quick(CHANGES, 2))
def test_a_change_of_the_training_is_refused_with_both_values_unless_allowed(tiny_args, key, value, was):
    trained(tiny_args("run", total_steps=2))
    with pytest.raises(ConfigError, match=f"{key}.*{value}.*{was}"):
        trained(tiny_args("run", total_steps=3, **{key: value}))
    trained(tiny_args("run", total_steps=3, allow_changes=f"[{key}]", **{key: value}))


def test_a_run_of_a_version_without_a_key_resumes_with_its_default(tiny_args):
    now = configuration.to_dict(tiny_args())
    newer = ("batch_schedule", "adapter", "optim.decay_shape", "optim.decay_tokens", "optim.lr_batch_scaling")
    flat = {key: value for key, value in configuration.flatten(now).items() if not key.startswith(newer)}
    saved = now | {"optim": {key[6:]: value for key, value in flat.items() if key.startswith("optim.")}}
    check_changes({key: value for key, value in saved.items() if key not in newer}, now, ())
    with pytest.raises(ConfigError, match="batch_schedule: is .* now and was \\[\\]"):
        rows = {"batch_schedule": [{"from_step": 1, "size": 8}]}
        check_changes({key: value for key, value in saved.items() if key not in newer}, now | rows, ())


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


def test_a_signal_during_training_and_during_evaluation_changes_no_line(tiny_args, evaluated):
    """Stopped in the last evaluation, too: the resumed run does it again, once, and each step stands once."""
    whole = trained(tiny_args("whole", **evaluated))
    config = tiny_args("run", **evaluated)
    # The second evaluation of a resumed run is the next one: its first makes up for the one that was interrupted.
    stops = [stop_in_evaluation(config, number) for number in (1, 1, 2, 1, 2, 1)]
    assert stops == [4, 4, 8, 8, 12, 12]
    trained(config)
    assert history(config.run_dir) == history(whole.run_dir)
    losses = [[line.get("eval/v/CrossEntropyLoss") for line in lines_of(c.run_dir)] for c in (whole, config)]
    assert losses[0] == losses[1] and sum(loss is not None for loss in losses[0]) == 3
    assert is_no_op(config)


def test_killed_after_a_made_up_evaluation_a_run_logs_its_step_once(tiny_args, evaluated):
    changes = evaluated | {"checkpoint.interval_steps": 100, "total_steps": 8}
    whole = trained(tiny_args("whole", **changes))
    assert stop_in_evaluation(tiny_args("run", **changes), 1) == 4
    cut(tiny_args("run", **changes), steps=6)
    assert history(trained(tiny_args("run", **changes)).run_dir) == history(whole.run_dir)


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
    with pytest.raises(Stopped, match="saved after step 5 of 12"), signal_at_the_first_batch():
        next(run)
    assert folder.stat().st_ino == before


def test_a_line_of_an_evaluation_alone_tells_where_it_comes_from(tiny_args, evaluated):
    config = trained(tiny_args("run", **evaluated | {"eval.interval_steps": 3, "log.interval_steps": 4}))
    lines = {line["step"]: line for line in lines_of(config.run_dir)}
    assert list(lines) == [3, 4, 6, 8, 9, 12]
    assert all(line.keys() >= {"sample_hash", "skipped", "attempt", "world_size"} for line in lines.values())
    assert "train/CrossEntropyLoss" not in lines[3] and "eval/v/CrossEntropyLoss" in lines[3]


def stop_in_evaluation(config, number):
    """Train, and send SIGTERM to this process in the middle of its evaluation `number`; the step that it stops at."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="saved after step") as stopped:
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


def test_two_runs_cannot_share_a_run_dir(tiny_args, tiny_words, run_main, tmp_path):
    words = tiny_words("run", total_steps=100_000, **{"checkpoint.interval_steps": 100_000})
    run = fork(lambda: main(["train", *words]), os.devnull)
    wait_for(tmp_path / "run", 1)
    other = run_main("train", *words)
    assert other.returncode == 2 and f"in use by process {run}" in other.stderr.splitlines()[-1]
    os.kill(run, signal.SIGKILL)
    assert exit_code(run) == -signal.SIGKILL
    trained(tiny_args("run", total_steps=3))  # the lock ended with its holder


def test_a_branch_continues_in_a_new_run_dir(tiny_args, tmp_path):
    trained(tiny_args("trunk", total_steps=10))
    folder = tmp_path / "trunk" / "checkpoints" / "step-0000005"
    branch = {"total_steps": 10, "resume_from": folder}
    trained(tiny_args("same", **branch))
    trained(tiny_args("other", **branch, **{"data.seed": 9, "optim.peak_lr": 1e-3}))
    assert history(tmp_path / "same") == history(tmp_path / "trunk")[5:]
    ((step, other), *_), trunk = history(tmp_path / "other", "step", "sample_hash"), history(tmp_path / "trunk", "sample_hash")
    assert step == 6 and other != trunk[5][0]


def test_init_from_takes_weights_alone(tiny_args, read_metrics, tmp_path):
    trained(tiny_args("trunk", total_steps=10, **{"optim.warmup_steps": 1}))
    trained(tiny_args("warm", total_steps=2, init_from=tmp_path / "trunk", **{"optim.warmup_steps": 1}))
    trunk, warm = read_metrics(tmp_path / "trunk"), read_metrics(tmp_path / "warm")
    assert [line["step"] for line in warm] == [1, 2] and warm[0]["sample_hash"] == trunk[0]["sample_hash"]
    assert warm[0]["train/CrossEntropyLoss"] < trunk[0]["train/CrossEntropyLoss"] - 0.05

"""checkpoint.keep_best and eval.stop_after: the best checkpoint is kept, and a run that no longer improves ends, also when it is
killed and resumed."""

import json
import os
import signal

import pytest
from ranks import exit_code, fork
from runs import cut, events_of, first_quick, lines_of, trained, trained_on

from olmo_train.checkpoint import folders, save
from olmo_train.errors import ConfigError, Stopped
from olmo_train.eval.during_run import Best, Evaluation
from olmo_train.run.run import Run

NAME = "eval/held/CrossEntropyLoss"


@pytest.fixture
def overfitting(tiny_args, held_out):
    """overfitting(name, **changes): a run whose validation loss falls, then rises, as its learning rate is far too high at the
    end of the warmup."""

    def config(name="run", **changes):
        values = {"total_steps": 24, "optim.peak_lr": 0.3, "optim.warmup_steps": 20, "optim.warmup_start_ratio": 0.001,
                  "eval.interval_steps": 2, "checkpoint.interval_steps": 3, "checkpoint.keep_last": 1,
                  "model.d_model": 32, "model.n_layers": 1,
                  "checkpoint.keep_best": NAME, "eval.stop_after": 2, "data.validation.held.path": held_out}  # fmt: skip
        return tiny_args(name, **(values | changes))

    return config


def losses_of(run_dir) -> dict[int, float]:
    return {line["step"]: line[NAME] for line in lines_of(run_dir) if NAME in line}


def best_of(run_dir) -> dict:
    return json.loads((run_dir / "best.json").read_text())


def test_a_run_ends_after_its_last_improvement_and_keeps_the_best_checkpoint(overfitting, tmp_path, capsys):
    trained(overfitting())
    losses = losses_of(tmp_path / "run")
    best, end = min(losses, key=losses.get), max(losses)
    assert 2 < best < end < 24 and list(losses) == list(range(2, end + 1, 2)) and end == best + 4
    assert best_of(tmp_path / "run") == {"step": best, "metric": NAME, "value": losses[best]}
    assert list(folders.committed(tmp_path / "run")) == [best, end]  # neither is a multiple of interval_steps alone
    said = capsys.readouterr().out
    assert f"the run ends after step {end}: 2 evaluations without a better {NAME} than {losses[best]:.4f} of step {best}" in said
    assert "finished after" in said and f"{end} steps" in said

    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    trained(overfitting())
    assert f"run is finished: {end} of 24 steps" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert [event["step"] for event in events_of(tmp_path / "run", "finish")] == [end]


def test_a_longer_patience_continues_a_run_that_has_ended(overfitting, tmp_path):
    trained(overfitting())
    best, end = best_of(tmp_path / "run"), max(losses_of(tmp_path / "run"))
    trained(overfitting(**{"eval.stop_after": 3}))
    assert max(losses_of(tmp_path / "run")) == end + 2
    assert best_of(tmp_path / "run") == best and best["step"] in folders.committed(tmp_path / "run")


def killed(config, moment: str, step: int) -> None:
    """Kill the run, without any clean-up, when it calls this function at this step."""
    owner, name = {"best.json": (save, "write_best"), "save": (Run, "save"), "log": (Run, "log")}[moment]
    inner = getattr(owner, name)

    def function(*args, **options):
        if (args[1]["step"] if moment == "best.json" else args[1]) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **options)

    setattr(owner, name, function)
    trained(config)


@pytest.mark.parametrize("moment, after", first_quick([("best.json", 0), ("save", 0), ("log", 2), ("save", 4)]))
def test_a_killed_run_ends_where_an_undisturbed_one_does(overfitting, tmp_path, moment, after):
    """Killed `after` steps after the best one: when it is committed, before it is saved, at the next evaluation, at the end."""
    trained(overfitting("whole"))
    step = best_of(tmp_path / "whole")["step"] + after
    assert exit_code(fork(lambda: killed(overfitting(), moment, step), tmp_path / "stderr")) == -signal.SIGKILL
    trained(overfitting())
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert best_of(tmp_path / "run") == best_of(tmp_path / "whole")
    assert list(folders.committed(tmp_path / "run")) == list(folders.committed(tmp_path / "whole"))


@pytest.mark.parametrize("steps", first_quick([1, 2, 7]))
def test_a_run_that_is_left_and_resumed_counts_its_evaluations_once(overfitting, tmp_path, steps):
    trained(overfitting("whole"))
    cut(overfitting(), steps)
    trained(overfitting())
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert best_of(tmp_path / "run") == best_of(tmp_path / "whole")


def test_an_evaluation_that_a_signal_interrupts_counts_when_it_is_made(overfitting, tmp_path, monkeypatch):
    trained(overfitting("whole"))
    best, end = best_of(tmp_path / "whole"), max(losses_of(tmp_path / "whole"))
    measure = Evaluation.measure
    for step in (best["step"], end):

        def interrupted(self, *args, step=step):
            if folders.committed(tmp_path / "run").get(step) is None and lines_of(tmp_path / "run")[-1]["step"] == step - 1:
                signal.raise_signal(signal.SIGTERM)
            return measure(self, *args)

        monkeypatch.setattr(Evaluation, "measure", interrupted)
        with pytest.raises(Stopped):
            trained(overfitting())
        monkeypatch.setattr(Evaluation, "measure", measure)
    trained(overfitting())
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert best_of(tmp_path / "run") == best
    assert best["step"] in folders.committed(tmp_path / "run")


def test_two_processes_end_together(overfitting, tmp_path):
    trained_on(2, overfitting())
    losses = losses_of(tmp_path / "run")
    assert best_of(tmp_path / "run")["step"] == min(losses, key=losses.get) == max(losses) - 4


def test_keep_best_that_is_set_later_names_a_checkpoint_that_is_there(overfitting, tmp_path):
    cut(overfitting(**{"checkpoint.keep_best": None, "eval.stop_after": None}), 16)
    losses = losses_of(tmp_path / "run")
    trained(overfitting(**{"eval.stop_after": None, "total_steps": 18}))
    assert best_of(tmp_path / "run")["step"] in folders.committed(tmp_path / "run")
    assert best_of(tmp_path / "run")["step"] != min(losses, key=losses.get)


def test_the_best_is_listed_and_not_pruned(overfitting, tmp_path, run_main):
    trained(overfitting())
    best, end = best_of(tmp_path / "run")["step"], max(losses_of(tmp_path / "run"))
    listed = run_main("checkpoints", tmp_path / "run", "--prune").stdout.splitlines()
    assert len(listed) == 2 and listed[0].endswith("best") and not listed[1].endswith("best")
    assert list(folders.committed(tmp_path / "run")) == [best, end]


def test_the_curves_of_a_run_that_ended_early_say_finished(overfitting, tmp_path):
    from olmo_train.curves.runs import read_run

    trained(overfitting())
    assert read_run(tmp_path / "run").state == "finished"


def test_equal_and_non_finite_values_are_no_improvement():
    best = Best(NAME, 3)
    for step, value in enumerate([None, 2.0, 2.0, float("nan"), None], start=1):
        assert not best.ends_run
        best.add(step, {NAME: value})
    assert (best.step, best.since, best.ends_run) == (2, 3, True)


@pytest.mark.parametrize("changes, key, words", [
    ({"checkpoint.keep_best": "eval/held/Loss"}, "checkpoint.keep_best", [NAME, "eval/held/Perplexity", "did you mean"]),
    ({"checkpoint.keep_best": "train/CrossEntropyLoss"}, "checkpoint.keep_best", [NAME]),
    ({"data.validation.held.path": None}, "checkpoint.keep_best", ["names no source"]),
    ({"checkpoint.keep_best": None}, "eval.stop_after", ["checkpoint.keep_best", NAME]),
])  # fmt: skip
def test_a_name_without_a_metric_is_refused_with_those_that_exist(overfitting, tmp_path, changes, key, words):
    with pytest.raises(ConfigError) as problem:
        trained(overfitting(**changes))
    assert problem.value.where == key and all(word in problem.value.what for word in words)
    assert not (tmp_path / "run").exists()

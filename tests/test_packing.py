"""Packed sources: whole documents in windows, padding, cut prompts, document masks, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_sources import contents, texts
from runs import LOSS, first_model, lines_of
from test_adapter import with_values
from test_templates import chat_tokenizer  # noqa: F401
from test_verify import edit_meta

from olmo_train import config as configuration
from olmo_train.data.config import SourceConfig
from olmo_train.data.loader import IGNORE, read_batch, validation_batches
from olmo_train.data.meta import BEGINS, SCORED, hash_file, read_meta
from olmo_train.data.order import BatchSizes
from olmo_train.data.prepare import chunks, packing, prepare, readers
from olmo_train.data.prepare.prepare import PrepareOptions
from olmo_train.data.shards import open_source
from olmo_train.data.templates import open_format
from olmo_train.data.verify import verify
from olmo_train.errors import ConfigError
from olmo_train.eval.heldout import measure
from olmo_train.model.config import AdapterConfig
from olmo_train.train_config import TrainConfig

PACK = 64


def pairs(n, seed=0):
    """Records with prompts and short responses; every seventh is a chat of two rounds."""
    answers = [text[:20] or "yes" for text in texts(2 * n, seed + 1)]
    for i, prompt in enumerate(texts(n, seed)):
        record = {"id": f"doc-{i}", "prompt": prompt[:60], "response": answers[i].strip() or "no"}
        if i % 7 == 3:
            rounds = ((prompt[:20], answers[i]), ("and?", answers[n + i]))
            turns = [turn for asked, answer in rounds for turn in (("user", asked), ("assistant", answer.strip() or "no"))]
            record = {"id": f"doc-{i}", "messages": [{"role": role, "content": text} for role, text in turns]}
        yield record


@pytest.fixture
def packed(tmp_path, chat_tokenizer):  # noqa: F811
    """packed(name, **options): a packed source of 200 conversations, PACK tokens a window."""

    def make(name="packed", records=None, **options):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records or pairs(200)))
        options = {"template": "chatml", "pack": PACK, "cut": "prompt", "max_shard_tokens": 1500, **options}
        prepare.prepare(PrepareOptions((str(file),), tmp_path / name, str(chat_tokenizer), **options))
        return tmp_path / name

    return make


def arrays_of(folder):
    """(tokens, label masks, rows of documents.parquet with positions in the stream) of a source."""
    meta = read_meta(folder)
    starts = np.cumsum([0] + [shard.tokens for shard in meta.shards])
    tokens = np.concatenate([np.fromfile(folder / shard.file, np.dtype(meta.dtype)) for shard in meta.shards])
    mask = np.concatenate([np.fromfile(folder / shard.labels["file"], np.uint8) for shard in meta.shards])
    rows = pq.read_table(folder / "documents.parquet").to_pylist()
    return (
        tokens,
        mask,
        [row | {"start": row["start"] + starts[row["shard"]], "end": row["end"] + starts[row["shard"]]} for row in rows],
    )


def test_no_document_crosses_a_window_and_padding_is_counted_and_unscored(packed, chat_tokenizer):  # noqa: F811
    folder = packed()
    meta, (tokens, mask, rows) = read_meta(folder), arrays_of(folder)
    chat = open_format("chatml", chat_tokenizer, None, None)
    assert meta.tokens == len(tokens) and len(tokens) % PACK == 1 and meta.documents == len(rows) == 200
    held = np.zeros(len(tokens), bool)
    for row in rows:
        start, end = row["start"], row["end"]
        assert start // PACK == end // PACK and not held[start : end + 1].any()
        held[start : end + 1] = True
        assert mask[start] == BEGINS and mask[end] == SCORED and tokens[end] == chat.tokenizer.eos_id
    assert meta.padding == (~held).sum()
    assert not (mask[~held] & SCORED).any() and (tokens[~held] == chat.tokenizer.eos_id).all()
    assert not (mask[PACK::PACK] & SCORED).any()  # the label of a window's last token
    assert verify(folder)[1] == []
    by_id = {row["id"]: tokens[row["start"] : row["end"] + 1].tolist() for row in rows}
    for record in pairs(200):
        turns = [("user", record["prompt"]), ("assistant", record["response"])] if "prompt" in record else [
            (message["role"], message["content"]) for message in record["messages"]]  # fmt: skip
        pieces = chat.render(turns)
        assert "".join(p.marker + p.read + p.scored for p in pieces) == chat.tokenizer.decode(by_id[record["id"]])


def test_best_fit_leaves_less_than_half_of_the_padding_of_windows_filled_in_order(packed):
    folder = packed()
    lengths = {row["id"]: row["end"] + 1 - row["start"] for row in arrays_of(folder)[2]}
    windows, room = 0, 0
    for i in range(200):
        if lengths[f"doc-{i}"] > room:
            windows, room = windows + 1, PACK
        room -= lengths[f"doc-{i}"]
    assert read_meta(folder).padding - 1 < (windows * PACK - sum(lengths.values())) / 2


@pytest.mark.parametrize("pool", [2**20, 10 * PACK])
def test_the_bytes_depend_on_neither_workers_nor_saves_nor_interruptions(packed, monkeypatch, pool):
    for module in (chunks, readers):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(packing, "POOL_TOKENS", pool)
    options = {"validation_fraction": 0.1}
    whole = packed("whole", **options)
    assert verify(whole)[1] == [] and verify(whole / "validation")[1] == []
    if pool == 2**20:
        assert contents(packed("two", workers=2, **options)) == contents(whole)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0)
    assert contents(packed("often", **options)) == contents(whole)
    for stop_after in (1, 7, 15):
        with monkeypatch.context() as patch:
            calls = iter(range(1000))

            def take_then_stop(run, result, take=prepare._Run._take, calls=calls, stop_after=stop_after):
                take(run, result)
                if next(calls) == stop_after:
                    raise KeyboardInterrupt

            patch.setattr(prepare._Run, "_take", take_then_stop)
            with pytest.raises(KeyboardInterrupt):
                packed(f"stopped-{stop_after}", **options)
        assert contents(packed(f"stopped-{stop_after}", **options)) == contents(whole)
    with monkeypatch.context() as patch:
        patch.setattr(prepare._Run, "_refuse_nothing", lambda run: 1 / 0)  # after the last save
        with pytest.raises(ZeroDivisionError):
            packed("late", **options)
    assert contents(packed("late", **options)) == contents(whole)


def test_prompts_are_cut_and_responses_never(packed, chat_tokenizer, tmp_path):  # noqa: F811
    records = [
        {"id": "long", "prompt": "word " * 300, "response": "the answer"},
        {"id": "answer", "prompt": "why?", "response": "because " * 300},
        {"id": "short", "prompt": "why?", "response": "so"},
        {"id": "chat", "messages": [{"role": role, "content": text} for role, text in (
            ("system", "Be kind."), ("user", "x " * 90), ("assistant", "yes"), ("user", "y " * 80), ("assistant", "no"))]},
    ]  # fmt: skip
    folder = packed(records=records, instruction="Say it briefly.")
    meta, (tokens, _, rows) = read_meta(folder), arrays_of(folder)
    chat = open_format("chatml", chat_tokenizer, None, None)
    text = {row["id"]: chat.tokenizer.decode(tokens[row["start"] : row["end"] + 1]) for row in rows}
    assert text.keys() == {"long", "short", "chat"}
    assert meta.account["cut_prompts"] == 2
    assert meta.account["left_out"]["does not fit in a window of --pack"]["records"] == 1
    assert text["long"].startswith("<|im_start|>user\nSay it briefly.\n\nword word")
    assert text["long"].endswith("<|im_end|>\n<|im_start|>assistant\nthe answer<|im_end|>")
    assert "Be kind.<|im_end|>" in text["chat"] and "assistant\nyes<|im_end|>" in text["chat"]
    length = {row["id"]: row["end"] + 1 - row["start"] for row in rows}
    assert PACK - 4 <= length["long"] <= PACK  # cut no shorter than needed
    uncut = read_meta(packed("uncut", records, cut=None))
    assert uncut.documents == 1 and uncut.account["left_out"]["does not fit in a window of --pack"]["records"] == 3


def words_on(tiny_words, folder, name="run", **changes):
    data = {"data.sources.a.path": folder, "data.document_mask": "true", "model.seq_len": PACK}
    return tiny_words(name, **{**data, **changes})


@pytest.fixture
def on(tiny_words):
    """on(folder, **changes): a tiny configuration that trains on a packed source."""
    return lambda folder, name="run", **changes: configuration.load(
        TrainConfig, [], words_on(tiny_words, folder, name, **changes)
    )


@pytest.mark.parametrize("kind", ["none", "dora"])
def test_packed_windows_have_the_losses_of_one_document_a_row(packed, on, kind):
    config = on(packed(), global_batch_size=8)
    mixture, model = config.mixture(), first_model(config.model).eval()
    if kind != "none":
        with_values(model, AdapterConfig(kind))
    batch, instances = read_batch(mixture, 1, 0, 1), mixture.global_batch(1)
    compared = 0
    with torch.no_grad():
        logits = model(batch.input_ids, documents=batch.documents).log_softmax(-1)
        for row, instance in enumerate(instances.instance.tolist()):
            start = mixture.span(0, instance)[0]
            for document in mixture.sources[0].documents(start, start + PACK):
                low, high = document.start - start, document.end + 1 - start
                alone = model(batch.input_ids[row : row + 1, low:high]).log_softmax(-1)
                scored = [at for at in range(low, high - 1) if batch.labels[row, at] != IGNORE]
                one = -sum(float(alone[0, at - low, batch.labels[row, at]]) for at in scored)
                assert -sum(float(logits[row, at, batch.labels[row, at]]) for at in scored) == pytest.approx(one, rel=1e-6)
                compared += len(scored)
    assert compared == (batch.labels != IGNORE).sum() > 50
    assert (batch.labels[:, -1] == IGNORE).all()


def test_validation_reads_packed_documents_as_training_does(packed, on):
    config = on(packed())
    mixture = config.mixture()
    by_instance = {}
    for batch in validation_batches(mixture.sources[0], PACK, 4, 0, 1, mixture.eos_id):
        for row in range(4):
            by_instance[tuple(batch.input_ids[row].tolist())] = (batch.labels[row], batch.documents[row])
    batch = read_batch(mixture, 1, 0, 1)
    for row in range(len(batch.input_ids)):
        labels, documents = by_instance[tuple(batch.input_ids[row].tolist())]
        assert torch.equal(labels, batch.labels[row])
        assert torch.equal(documents.diff(), batch.documents[row].diff())


def test_turns_of_an_unpacked_chat_are_one_document_of_the_mask(packed, on):
    config = on(packed(pack=None, cut=None))
    mixture = config.mixture()
    batch, instances = read_batch(mixture, 1, 0, 1), mixture.global_batch(1)
    for row, instance in enumerate(instances.instance.tolist()):
        start = mixture.span(0, instance)[0]
        ends = [d.end - start for d in mixture.sources[0].documents(start, start + PACK) if d.end + 1 - start < PACK]
        assert (batch.documents[row].diff().nonzero().flatten()).tolist() == ends
    assert verify(Path(config.data.sources["a"].path))[1] == []


def plant(folder, change):
    """Change the arrays of a one-shard source and correct every hash, as a fault in prepare-data would."""
    meta = read_meta(folder)
    (shard,) = meta.shards
    mask = np.fromfile(folder / shard.labels["file"], np.uint8)
    rows = pq.read_table(folder / "documents.parquet").to_pydict()
    change(mask, np.array(rows["start"]), np.array(rows["end"]))
    mask.tofile(folder / shard.labels["file"])
    edit_meta(folder, lambda meta: meta["shards"][0]["labels"].update(sha256=hash_file(folder / shard.labels["file"])))
    return [problem.what for problem in verify(folder)[1]]


def test_verify_sees_scored_padding_an_unscored_end_a_missing_mark_and_a_crossing(packed):
    options = {"max_shard_tokens": 10**6}

    def scored_padding(mask, starts, ends):
        gap = next(end + 1 for end, start in zip(ends, starts[1:], strict=False) if start > end + 1)
        mask[gap] |= SCORED

    assert "padding and a document's first token to be unscored" in plant(packed("a", **options), scored_padding)[0]
    assert "EOS of a document to be scored" in plant(packed("b", **options), lambda m, s, e: m.put(e[3], 0))[0]
    assert "expected a mark of a document's begin" in plant(packed("c", **options), lambda m, s, e: m.put(s[3], 0))[0]
    assert "expected no mark" in plant(packed("d", **options), lambda m, s, e: m.put(s[3] + 1, BEGINS))[0]
    folder = packed("e", **options)
    edit_meta(folder, lambda meta: meta.update(pack=32))
    assert any("expected no document across a window of 32" in problem.what for problem in verify(folder)[1])


def test_a_packed_source_needs_its_seq_len_its_mask_and_packed_company(packed, on, tiny_tokens):
    folder = packed()
    for changes, message in [
        (
            {"model.seq_len": 32},
            f"model.seq_len: 32 is not the {PACK} tokens of the windows of data.sources.a; set model.seq_len=64",
        ),
        ({"data.document_mask": "false"}, "data.document_mask: is false, but data.sources.a is packed"),
        ({"data.sources.b.path": tiny_tokens, "data.eos_id": read_meta(folder).eos_id}, "data.sources: mixes a, which is packed"),
        ({"data.order": "olmo"}, "data.order: 'olmo' reads across the windows"),
    ]:
        with pytest.raises(ConfigError) as refused:
            on(folder, **changes).mixture()
        assert str(refused.value).startswith(message)
    validation = {"data.validation.v.path": folder, "data.sources.a.path": tiny_tokens, "data.eos_id": read_meta(folder).eos_id}
    for changes, key in (({"model.seq_len": 32}, "model.seq_len"), ({"data.document_mask": "false"}, "data.document_mask")):
        with pytest.raises(ConfigError, match=f"{key}: .*data.validation.v"):
            on(folder, **validation, **changes).mixture().open_validation()


def test_a_packed_run_is_trained_inspected_and_asked(packed, on, tiny_words, run_main, tmp_path):
    folder = packed(instruction="Say it.")
    words = words_on(tiny_words, folder, total_steps=None, total_epochs=1,
                     **{"data.validation.v.path": folder, "eval.interval_steps": 4})  # fmt: skip
    assert run_main("train", *words).returncode == 0
    losses = [line[LOSS] for line in lines_of(tmp_path / "run") if LOSS in line]
    assert losses[-1] < losses[0]
    assert any("eval/v/CrossEntropyLoss" in line for line in lines_of(tmp_path / "run"))
    (*_, last) = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    about = json.loads((last / "tokenizer_config.json").read_text())
    assert about["eos_token"] == "<|im_end|>" and about["template"]["name"] == "chatml"
    shown = run_main("inspect-data", tmp_path / "run", "--step", "2")
    assert f"no document crosses a window of {PACK} tokens" in shown.stdout and " of padding" in shown.stdout
    rows = json.loads(run_main("inspect-data", tmp_path / "run", "--step", "2", "--json").stdout)["instances"]
    for row in rows:
        assert all(row["start"] <= d["start"] and d["end"] < row["start"] + PACK for d in row["documents"])
        assert row["padding"] == row["start"] + PACK - row["documents"][-1]["end"] - 1
    seen = json.loads(run_main("inspect-data", tmp_path / "run", "--document", "a:doc-5", "--json").stdout)["visits"]
    assert len({visit["instance"] for visit in seen}) == 1
    options = ("--template", "chatml", "--temperature", "0", "--max-new-tokens", "5", "--json")
    (answer,) = json.loads(run_main("generate", tmp_path / "run", "--prompt", "the cat", *options).stdout)
    assert 1 <= len(answer["tokens"]) <= 5
    assert "in windows of 64" in run_main("verify-data", folder).stdout
    refused = run_main("generate", tmp_path / "run", "--template", "chatlm")
    assert refused.returncode == 2 and "--template: 'chatlm' is not a choice" in refused.stderr


def test_total_epochs_are_whole_passes_also_when_the_batch_changes(packed, on, tiny_words, run_main, tmp_path):
    folder = packed()
    config = on(folder, total_steps=None, total_epochs=2)
    mixture = config.mixture()
    (size,) = mixture.sizes
    assert mixture.places_of_epochs(2) == 2 * size
    assert config.with_length(mixture).steps == -(-2 * size // 8)
    mixture.set_batches(mixture.batches.after(3, BatchSizes(((1, 4),))))
    steps = config.with_length(mixture).steps_with(mixture.batches)
    assert mixture.batches.places_before(steps + 1) >= 2 * size > mixture.batches.places_before(steps)
    words = words_on(tiny_words, folder, total_steps=None, total_epochs=1, **{"optim.warmup_steps": 2})
    assert run_main("train", *words).returncode == 0
    assert lines_of(tmp_path / "run")[-1]["step"] == -(-size // 8)
    assert "is finished" in run_main("train", *words).stdout
    shown = run_main("inspect-data", tmp_path / "run", "--step", "1").stdout
    assert f"step 1 of {-(-size // 8)}" in shown
    plan = json.loads(run_main("plan", *words, "--json").stdout)
    assert plan["total_steps"] == -(-size // 8) and 1 <= plan["sources"]["a"]["epochs"] < 1 + 8 / size
    assert "total_epochs: 1" in run_main("config", *words).stdout
    longer = run_main("train", *[word.replace("total_epochs=1", "total_epochs=2") for word in words])
    assert longer.returncode == 0 and lines_of(tmp_path / "run")[-1]["step"] == -(-2 * size // 8)


def test_total_epochs_count_the_source_of_the_largest_weight(packed, on):
    folder = packed()
    weights = {"data.sources.b.path": packed("more", list(pairs(80, 5))), "data.sources.b.weight": 0.25}
    mixture = on(folder, **weights).mixture()
    places = mixture.places_of_epochs(3)
    assert mixture.order.visits_before(places)[0] == 3 * mixture.sizes[0] > mixture.order.visits_before(places - 1)[0]
    dropped = on(folder, **weights, **{"data.stages": "[{from_step: 2, weights: {b: 1.0}}]"})
    with pytest.raises(ConfigError, match="total_epochs: 3 passes over a never end"):
        dropped.mixture().places_of_epochs(3)
    with pytest.raises(ConfigError, match="total_epochs: 2 and total_steps 12 are both set; leave one out"):
        on(folder, total_epochs=2)


def test_the_command_prints_windows_padding_and_cut_prompts(packed, run_main, tmp_path):
    folder = packed()
    meta = read_meta(folder)
    words = ("--tokenizer", folder, "--template", "chatml", "--pack", PACK, "--cut", "prompt", "--instruction", "Say it.")
    done = run_main("prepare-data", tmp_path / "pairs.jsonl", "--output", tmp_path / "out", "--workers", 1, *words)
    assert done.returncode == 0, done.stderr
    assert "model.seq_len=64 data.document_mask=true" in done.stdout and "prompts cut to fit in --pack 64: " in done.stdout
    assert read_meta(tmp_path / "out").documents == meta.documents and " of padding" in done.stdout


def test_packed_text_is_scored_but_for_the_first_token_of_each_document(packed):
    folder = packed(records=[{"text": text} for text in texts(60)], template=None, cut=None)
    tokens, mask, rows = arrays_of(folder)
    expected = np.zeros(len(tokens), np.uint8)
    for row in rows:
        expected[row["start"] + 1 : row["end"] + 1] = SCORED
    assert np.array_equal(mask & SCORED, expected) and (read_meta(folder).padding, len(tokens) % PACK) == (
        len(tokens) - sum(row["end"] + 1 - row["start"] for row in rows),
        1,
    )
    assert verify(folder)[1] == []


def test_a_model_with_a_longer_seq_len_evaluates_a_packed_source_in_its_windows(packed, on):
    source = open_source("held out", SourceConfig(str(packed())), 512)
    model = first_model(on(packed(), **{"model.seq_len": 2 * PACK}).model)
    short = first_model(on(packed()).model)
    assert measure(model, source, 4, False, None).loss == pytest.approx(measure(short, source, 4, True, None).loss, rel=1e-6)
    with pytest.raises(ConfigError, match="held out: is packed into windows of 64 tokens, more than the 32 of the model"):
        measure(first_model(on(packed(), **{"model.seq_len": 32}).model), source, 4, False, None)

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from data_sources import contents, prepare_source, texts, write_jsonl, write_tokenizer
from tokenizers import models

from olmo_train.data.config import SourceConfig
from olmo_train.data.prepare import chunks, documents, prepare, readers, writer
from olmo_train.data.prepare.writer import SourceWriter
from olmo_train.data.shards import open_source
from olmo_train.data.tokenizer import load_tokenizer
from olmo_train.data.verify import verify
from olmo_train.errors import ConfigError, DataError


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (chunks, readers):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1000)


def tokens_of(folder):
    return np.concatenate([np.fromfile(file, np.uint16) for file in sorted(folder.glob("tokens-*.bin"))])


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def write_lines(file, lines):
    file.write_text("".join(lines), encoding="utf-8")
    return file


def test_tokens_on_disk_are_the_documents_tokens_each_with_an_eos(tmp_path):
    folder, result = prepare_source(tmp_path)
    tokenizer = load_tokenizer(folder)
    expected = [id for text in texts(60) for id in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert tokens_of(folder).tolist() == expected
    assert result.meta.tokens == len(expected)
    assert result.meta.documents == 60
    assert result.meta.bytes == sum(len(text.encode()) for text in texts(60))
    assert verify(folder)[1] == []


def test_no_document_is_split_and_no_shard_is_too_long(tmp_path):
    folder, result = prepare_source(tmp_path, max_shard_tokens=100)
    rows = pq.read_table(folder / "documents.parquet").to_pylist()
    assert len(result.meta.shards) > 10
    for shard, meta in enumerate(result.meta.shards):
        ends = [row["end"] for row in rows if row["shard"] == shard]
        assert ends[-1] + 1 == meta.tokens
        assert meta.tokens <= 100 or len(ends) == 1


def test_every_document_knows_its_file_record_and_span(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", 5, ids=False)
    (tmp_path / "a.txt").write_text("a text")
    folder, _ = prepare_source(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl")
    rows = pq.read_table(folder / "documents.parquet").to_pylist()
    assert [(row["origin"], row["record"]) for row in rows] == [
        (str(tmp_path / "a.txt"), None),
        *((str(tmp_path / "b.jsonl"), i) for i in range(1, 6)),
    ]
    assert rows[3]["id"] == f"{tmp_path}/b.jsonl:3"


def test_the_output_is_the_same_bytes_for_any_number_of_workers(tmp_path, small_chunks):
    write_jsonl(tmp_path / "a.jsonl", 300)
    options = {"max_shard_tokens": 2000, "validation_fraction": 0.1}
    one, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="one", workers=1, **options)
    two, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="two", workers=2, **options)
    assert contents(one) == contents(two)


def test_the_output_does_not_depend_on_when_it_was_saved(tmp_path, small_chunks, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", 320)
    monkeypatch.setattr(documents, "GROUP_ROWS", 16)
    monkeypatch.setattr(documents, "SORT_ROWS", 64)  # divides 320, so the last ids leave nothing in memory
    seldom, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="seldom")
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0)
    often, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="often")
    assert contents(seldom) == contents(often)
    assert verify(often)[1] == []
    groups = pq.ParquetFile(often / "documents.parquet")
    assert groups.num_row_groups > 320 / 16
    source = open_source("test", SourceConfig(str(often)), 280)
    for i in range(0, 320, 7):
        document = source.find_documents({f"doc-{i}"})[0]
        assert source.documents(document.start, document.start + 1) == [document]
    assert [d.id for d in source.documents(0, source.n_tokens)] == [f"doc-{i}" for i in range(320)]


class Interrupted(Exception):
    """As a kill: nothing is cleaned up."""


@pytest.mark.parametrize("stop_after", [1, 2, 5, 11])
@pytest.mark.parametrize("save_seconds", [0, 1000])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, small_chunks, monkeypatch, stop_after, save_seconds):
    rows = [{"text": t} for t in texts(200)] + [{"prompt": t, "response": t} for t in texts(50, seed=1)]
    rows[40] = {"nothing": "here"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_shard_tokens": 1500, "validation_fraction": 0.1}
    whole, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="whole", **options)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", save_seconds)
    with monkeypatch.context() as patch:
        calls = iter(range(1000))

        def take_then_stop(run, result, take=prepare._Run._take):
            take(run, result)
            if next(calls) == stop_after:
                raise Interrupted

        patch.setattr(prepare._Run, "_take", take_then_stop)
        with pytest.raises(Interrupted):
            prepare_source(tmp_path, tmp_path / "a.jsonl", name="stopped", **options)
    assert not (tmp_path / "stopped" / "meta.json").exists()
    stopped, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="stopped", **options)
    assert contents(stopped) == contents(whole)


@pytest.mark.parametrize("place", [(SourceWriter, "_close_shard"), (documents, "id_hash"), (writer, "write_meta")])
def test_a_run_killed_while_finishing_continues_to_the_same_bytes(tmp_path, monkeypatch, place):
    whole, _ = prepare_source(tmp_path, write_jsonl(tmp_path / "a.jsonl", 60), name="whole")
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise Interrupted

        patch.setattr(*place, interrupt)
        with pytest.raises(Interrupted):
            prepare_source(tmp_path, tmp_path / "a.jsonl", name="stopped")
    stopped, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="stopped")
    assert contents(stopped) == contents(whole)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid):
    """Whether a process is there; one that has ended and waits for its parent to notice is not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_process_continues_and_leaves_no_workers(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 20_000)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    command = [sys.executable, "-m", "olmo_train", "prepare-data", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer)]
    command += ["--output", str(tmp_path / "killed"), "--workers", "2", "--max-shard-tokens", "50000"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "tokens-00001.bin").exists():
        assert process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(map(running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(command, check=True, capture_output=True)
    whole, _ = prepare_source(tmp_path, tmp_path / "a.jsonl", name="whole", max_shard_tokens=50_000)
    assert contents(tmp_path / "killed") == contents(whole)


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    folder, _ = prepare_source(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    _, again = prepare_source(tmp_path)
    assert again.already_finished
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_another_recipe_into_the_same_folder_is_refused(tmp_path):
    prepare_source(tmp_path, write_jsonl(tmp_path / "a.jsonl", 60))
    with pytest.raises(ConfigError, match="was prepared with max_shard_tokens 1000, now it is 999"):
        prepare_source(tmp_path, tmp_path / "a.jsonl", max_shard_tokens=999)
    write_jsonl(tmp_path / "a.jsonl", 60, seed=1)
    with pytest.raises(ConfigError, match="was prepared with input_"):
        prepare_source(tmp_path, tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", 60)
    write_tokenizer(tmp_path / "tokenizer.json", 290)
    with pytest.raises(ConfigError, match="was prepared with tokenizer_sha256"):
        prepare_source(tmp_path, tmp_path / "a.jsonl")


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        prepare_source(tmp_path)
    assert [file.name for file in (tmp_path / "source").iterdir()] == ["thesis.txt"]


def test_corrupt_records_are_named_and_counted_or_stop_it_all(tmp_path):
    lines = [json.dumps({"text": text}) for text in texts(30)]
    lines[7], lines[20] = "{broken", json.dumps({"text": ""})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    _, result = prepare_source(tmp_path, tmp_path / "a.jsonl")
    assert result.meta.documents == 28
    assert result.meta.skipped["records"] == 1
    assert result.meta.skipped["empty"] == 1
    assert result.meta.skipped["first"][0]["where"] == f"{tmp_path}/a.jsonl:8"
    with pytest.raises(DataError, match=r"a.jsonl:8: is not JSON"):
        prepare_source(tmp_path, tmp_path / "a.jsonl", name="strict", on_error="stop")
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.5}, {"workers": 2}])
def test_the_account_sums_to_the_bytes_and_records_of_the_input(tmp_path, small_chunks, options):
    lines = [json.dumps({"text": text}) + "\n" for text in texts(30)]
    lines[3], lines[7], lines[20] = "{broken\n", '{"text": 5}\n', json.dumps({"text": ""}) + "\n"
    lines[9:9] = ["\n"] * 5
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode())[:-40])
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    (tmp_path / "e.txt").write_text("plain")
    (tmp_path / "f.jsonl").write_text("\n\n")
    inputs = sorted(tmp_path.glob("*.*"))
    folder, result = prepare_source(tmp_path, *inputs, **options)
    read, written, left_out = (result.meta.account[key] for key in ("in", "out", "left_out"))
    assert read["files"] == 6
    assert read["bytes"] == sum(file.stat().st_size for file in inputs)
    assert read["bytes"] == written["bytes"] + sum(n["bytes"] for n in left_out.values())
    assert read["records"] == written["documents"] + sum(n["records"] for n in left_out.values())
    metas = [result.meta, *([result.validation] if result.validation else [])]
    assert written["documents"] == sum(meta.documents for meta in metas)
    assert written["tokens"] == sum(meta.tokens for meta in metas)
    assert left_out["is not JSON"]["bytes"] >= len(lines[3])
    assert left_out["holds int where text is expected"]["records"] >= 1
    assert left_out["has no text"]["records"] >= 1
    assert left_out["is not UTF-8"] == {"records": 1, "bytes": 4}
    assert left_out["holds no records"] == {"records": 0, "bytes": 2}
    assert left_out["has no text in a field 'text'"]["records"] == 1
    assert meta_of(folder)["account"] == result.meta.account


def test_in_files_that_are_not_compressed_the_account_is_exact_to_the_byte(tmp_path, small_chunks):
    lines = [json.dumps({"text": text}) + "\n" for text in texts(40)]
    for i in (5, 25):
        lines[i] = "{" + lines[i]
    _, result = prepare_source(tmp_path, write_lines(tmp_path / "a.jsonl", lines))
    assert result.meta.account["left_out"] == {"is not JSON": {"records": 2, "bytes": len(lines[5]) + len(lines[25])}}


def test_inputs_without_documents_are_refused_and_leave_nothing(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 5)
    (tmp_path / "kept").mkdir()
    with pytest.raises(
        DataError, match=r"contains no documents \(5 records skipped\).*no text in a field 'body'; its fields: text"
    ):
        prepare_source(tmp_path, tmp_path / "a.jsonl", name="kept", text_field="body")
    assert list((tmp_path / "kept").iterdir()) == []


def test_held_out_documents_are_every_kth_and_in_no_other_folder(tmp_path, small_chunks):
    folder, result = prepare_source(tmp_path, validation_fraction=0.1)
    held_out = pq.read_table(folder / "validation" / "documents.parquet")["id"].to_pylist()
    assert held_out == [f"doc-{i}" for i in range(9, 60, 10)]
    rest = pq.read_table(folder / "documents.parquet")["id"].to_pylist()
    assert sorted(held_out + rest) == sorted(f"doc-{i}" for i in range(60))
    assert result.validation.documents == 6
    assert verify(folder / "validation")[1] == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("n", [1, 3, 19])
def test_the_end_of_the_last_document_is_held_out_where_there_are_few(tmp_path, n, workers):
    files = [tmp_path / f"{i}.txt" for i in range(n)]
    for i, file in enumerate(files):
        file.write_text("".join(f"the cat {i} sat {line}\n" for line in range(1000)))
    folder, result = prepare_source(tmp_path, *files, validation_fraction=0.05, workers=workers)
    tokenizer, held_out = load_tokenizer(folder), folder / "validation"
    read, end = (tokenizer.decode(tokens_of(place)).split("<|endoftext|>")[:-1] for place in (folder, held_out))
    assert [*read[:-1], read[-1] + end[0]] == [file.read_text() for file in files] and len(end) == 1
    share = len(end[0]) / len(files[-1].read_text())
    assert share == pytest.approx(min(0.5, 0.05 * n), abs=0.01) and read[-1].endswith("\n")
    assert result.meta.bytes == len("".join(read)) and result.validation.bytes == len(end[0])
    assert not verify(folder)[1] and not verify(held_out)[1]


@pytest.mark.parametrize("text", ["one line that the cat sat on", "thecatsat", "the\ncat\nsat on a mat without a line break\n"])
def test_a_text_of_few_lines_is_cut_between_words_or_letters(tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    folder, _ = prepare_source(tmp_path, tmp_path / "one.txt", validation_fraction=0.05)
    read, end = (load_tokenizer(folder).decode(tokens_of(place)[:-1]) for place in (folder, folder / "validation"))
    assert read + end == text and read and end


def test_a_fraction_that_holds_nothing_out_is_refused(tmp_path):
    row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}
    chats = write_lines(tmp_path / "chats.jsonl", [json.dumps(row) + "\n"] * 60)  # which are not cut
    notes = []
    with pytest.raises(DataError, match="0.01 holds out one document in 100, of 60; raise it to 0.017 or leave it out"):
        prepare_source(tmp_path, chats, validation_fraction=0.01, on_note=notes.append)
    assert notes == []
    prepare_source(tmp_path, chats, name="raised", validation_fraction=0.017)
    with pytest.raises(ConfigError, match="at most 0.5"):
        prepare_source(tmp_path, validation_fraction=0.7)


def test_label_masks_score_answers_and_plain_text_and_every_eos(tmp_path):
    rows = [{"text": "plain"}, {"prompt": "a question", "response": "an answer"}, {"text": "more"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, result = prepare_source(tmp_path, tmp_path / "a.jsonl")
    tokenizer = load_tokenizer(folder)
    source = open_source("test", SourceConfig(str(folder)), 280)
    lengths = [len(tokenizer.encode(text)) for text in ("plain", "a question", "an answer", "more")]
    mask = np.zeros(source.n_tokens, np.uint8)
    source.read_label_mask(0, mask)
    assert mask.tolist() == [1] * (lengths[0] + 1) + [0] * lengths[1] + [1] * (lengths[2] + 1) + [1] * (lengths[3] + 1)
    assert source.has_label_mask
    assert verify(folder)[1] == []


def test_a_shard_without_instructions_has_no_mask_file(tmp_path):
    rows = [{"text": t} for t in texts(20)] + [{"prompt": "a", "response": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, result = prepare_source(tmp_path, tmp_path / "a.jsonl", max_shard_tokens=300)
    assert [shard.labels is not None for shard in result.meta.shards][-1]
    assert result.meta.shards[0].labels is None


def test_two_runs_into_one_folder_are_refused(tmp_path):
    with prepare._locked(tmp_path / "source"), pytest.raises(ConfigError, match="source: is being written by process [0-9]+ on"):
        prepare_source(tmp_path)


def test_text_that_the_tokenizer_does_not_know_or_takes_for_the_eos_is_a_counted_loss(tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in ("abba", "\u6771\u4eac", "ab</s>a", "b\u6771 a")]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    model = models.BPE({"a": 0, "b": 1, "</s>": 2, "<": 3, "/": 4, "s": 5, ">": 6}, [])  # no byte, and no unknown token
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    folder, result = prepare_source(tmp_path, tmp_path / "d.jsonl")
    left_out = {"has no character that the tokenizer knows": {"records": 1, "bytes": len(lines[1])}}
    left_out["characters that the tokenizer does not know"] = {"records": 0, "bytes": 3}
    assert result.meta.account["left_out"] == left_out
    assert result.meta.documents == 3 and result.meta.bytes == len("abbaab</s>ab a")
    assert verify(folder)[1] == []
    source = open_source("test", SourceConfig(str(folder)), 280)
    tokens = np.zeros(source.n_tokens, np.int64)
    source.read(0, tokens)
    assert tokens.tolist() == [0, 1, 1, 0, 2, 0, 1, 3, 4, 5, 6, 0, 2, 1, 0, 2]

    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["unk_token"] = "</s>"  # now what it does not know becomes the EOS
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    folder, result = prepare_source(tmp_path, tmp_path / "d.jsonl", name="unknown")
    reason = "has text that the tokenizer encodes as the end of a document"
    assert result.meta.account["left_out"] == {reason: {"records": 2, "bytes": len(lines[1] + lines[3])}}
    assert result.meta.skipped["first"] == [{"where": f"{tmp_path / 'd.jsonl'}:{n}", "why": reason} for n in (2, 4)]
    assert verify(folder)[1] == []


def test_the_eos_that_is_named_ends_the_documents_and_is_a_part_of_the_recipe(tmp_path):
    folder, result = prepare_source(tmp_path, eos="<|padding|>", workers=2)
    assert (result.meta.eos_text, result.meta.eos_id) == ("<|padding|>", 1)
    assert verify(folder)[1] == [] and load_tokenizer(folder).eos_id == 1
    with pytest.raises(ConfigError, match="eos_text '<|padding|>', now it is '<|endoftext|>'"):
        prepare_source(tmp_path)

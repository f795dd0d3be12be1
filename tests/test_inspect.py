"""inspect-data: what a run has read and will read, from either end, without torch and without an index."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EOS_ID

from olmo_train import config
from olmo_train.__main__ import main
from olmo_train.data.config import DataConfig, SourceConfig, StageConfig
from olmo_train.data.inspect import find_documents, rows_of_step, visits_of
from olmo_train.data.mixture import Mixture
from olmo_train.errors import ConfigError, DataError
from olmo_train.history import History, data_config

T, B = 16, 6  # seq_len, global batch size


def raw_file(path: Path, n_tokens: int, mark: int) -> str:
    """Tokens that tell where they stand: mark * 1000 + position modulo 900; every 50th is the EOS 999."""
    ids = mark * 1000 + np.arange(n_tokens) % 900
    ids[49::50] = 999
    ids.astype("<u2").tofile(path)
    return str(path)


def raw_mixture(tmp_path, order="permute", **more) -> Mixture:
    files = (raw_file(tmp_path / "b0.npy", 333, 2), raw_file(tmp_path / "b1.npy", 402, 3))
    sources = {
        "a": SourceConfig(raw_file(tmp_path / "a.npy", 1000, 1), 2.0 if order == "permute" else 1.0),
        "b": SourceConfig(files),
    }
    return Mixture(DataConfig(sources, order=order, seed=5, eos_id=999, **more), 0, B, T, 2**16)


@pytest.fixture
def prepared(tmp_path):
    """A folder of 40 documents with ids, of one token a word, prepared by the command."""
    lines = [json.dumps({"id": f"d{i}", "text": " ".join(f"w{(i * 7 + k) % 50}" for k in range(3 + i % 30))}) for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["train-tokenizer", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "t.json"), "--vocab-size", "300"]) == 0
    words = ["--output", str(tmp_path / "docs"), "--tokenizer", str(tmp_path / "t.json"), "--workers", "1"]
    assert main(["prepare-data", str(tmp_path / "in.jsonl"), *words]) == 0
    return tmp_path / "docs"


def inspect(capsys, *words) -> dict:
    capsys.readouterr()
    assert main(["inspect-data", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("order", ["permute", "olmo"])
def test_every_reading_of_every_document_is_found_from_both_ends(tmp_path, order):
    mixture, steps = raw_mixture(tmp_path, order), 40
    forward = {}
    for step in range(1, steps + 1):
        for row in rows_of_step(mixture, step, world_size=2):
            for d in row.documents:
                forward.setdefault((row.source, d.start), []).append((step, row.row, row.instance))
    for (name, start), seen in forward.items():
        source, (document,) = find_documents(mixture, f"{name}:@{start}")
        assert [(v.step, v.row, v.instance) for v in visits_of(mixture, source, document, 1, steps)] == sorted(seen)
    last = raw_mixture(tmp_path, order).sources[0].documents(0, 1000)
    assert {start for name, start in forward if name == "a"} == {d.start for d in last}  # and none was left out


def test_documents_of_a_row_are_those_of_its_tokens(tmp_path):
    mixture = raw_mixture(tmp_path)
    batch = mixture.global_batch(9)
    for tokens, row in zip(mixture.read(batch), rows_of_step(mixture, 9, 1), strict=True):
        ends = [d.end for d in row.documents if d.end < row.end]
        assert [row.start + i for i in np.flatnonzero(tokens == 999)] == ends
        assert row.documents[0].start <= row.start < row.end == row.start + T + 1


def test_ranks_share_the_rows_in_order(tmp_path):
    mixture = raw_mixture(tmp_path)
    whole = rows_of_step(mixture, 4, 3)
    assert [row.rank for row in whole] == [0, 0, 1, 1, 2, 2] and [row.row for row in whole] == list(range(6))
    assert rows_of_step(mixture, 4, 3, rank=1) == whole[2:4]
    assert rows_of_step(mixture, 4, 3, rank=1, most=1) == whole[2:3]
    for world_size, rank in ((4, None), (0, None), (3, 3)):
        with pytest.raises(ConfigError):
            rows_of_step(mixture, 4, world_size, rank)


def test_visits_follow_a_change_of_the_mix(tmp_path):
    mixture = raw_mixture(tmp_path, stages=(StageConfig(11, {"a": 1.0}),))
    for name, last in (("a", 60), ("b", 10)):
        found = [find_documents(mixture, f"{name}:@{position}") for position in range(0, 700, 50)]
        steps = {visit.step for source, (document,) in found for visit in visits_of(mixture, source, document, 1, 60)}
        assert min(steps) <= 3 and last - 2 <= max(steps) <= last


def test_wrong_document_words_are_refused(tmp_path):
    mixture = raw_mixture(tmp_path)
    for word, problem in (("a", ConfigError), ("c:1", ConfigError), ("a:@1000", DataError), ("a:d1", DataError)):
        with pytest.raises(problem):
            find_documents(mixture, word)


def run_words(tiny_words, prepared, **changes) -> list[str]:
    vocabulary = {"model.vocab_size": 320, "model.padded_vocab_size": 320, "model.seq_len": 16, "data.sources.a.path": prepared}
    return tiny_words("run", **(vocabulary | changes))


def train(words: list[str], steps: int | None = None) -> None:
    """Train, or be killed after `steps` steps."""
    from olmo_train.train import train
    from olmo_train.train_config import TrainConfig

    for stats in train(config.load(TrainConfig, [], words)):
        if stats.step == steps:
            break


def test_every_logged_step_is_inspected_as_it_was_logged(tiny_words, prepared, read_metrics, tmp_path, capsys):
    words = run_words(tiny_words, prepared)
    train(words, steps=7)  # the checkpoint is of step 5
    train(words)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        shown = inspect(capsys, tmp_path / "run", "--step", line["step"])
        assert shown["sample_hash"] == line["sample_hash"] and shown["as_logged"] is True and shown["step"] == line["step"]
    rows = shown["instances"]
    assert [row["row"] for row in rows] == list(range(8)) and {row["rank"] for row in rows} == {0}
    named = {d["id"]: d["origin"] for row in rows for d in row["documents"]}
    assert named and all(origin.endswith(f"in.jsonl:{int(id[1:]) + 1}") for id, origin in named.items())
    assert all(row["text"] and f"w{(int(row['documents'][0]['id'][1:]) * 7) % 50}"[0] in row["text"] for row in rows)


def test_text_is_that_of_the_instances_tokens(tiny_words, prepared, capsys):
    words = run_words(tiny_words, prepared)
    shown = inspect(capsys, *words, "--step", 2)
    mixture = data_config(config.read([], words)).mixture()
    from olmo_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(prepared)
    expected = [tokenizer.decode(tokens) for tokens in mixture.read(mixture.global_batch(2))]
    assert [row["text"] for row in shown["instances"]] == expected
    assert [row["text"] for row in inspect(capsys, *words, "--step", 2, "--brief")["instances"]] == [None] * 8


def test_a_documents_past_and_future_are_the_steps_that_read_it(tiny_words, prepared, tmp_path, capsys):
    words = run_words(tiny_words, prepared, total_steps=4)
    train(words)
    shown = inspect(capsys, tmp_path / "run", "total_steps=30", "--document", "a:d17")
    expected = []
    for step in range(1, 31):
        rows = inspect(capsys, tmp_path / "run", "total_steps=30", "--step", step, "--world-size", 4)["instances"]
        expected += [(step, row["row"]) for row in rows if any(d["id"] == "d17" for d in row["documents"])]
    assert [(v["step"], v["row"]) for v in shown["visits"]] == expected
    assert shown["done_steps"] == 4 and [v["done"] for v in shown["visits"]] == [step <= 4 for step, _ in expected]
    assert main(["inspect-data", str(tmp_path / "run"), "--document", "a:d17"]) == 0
    assert "to come" in capsys.readouterr().out
    assert main(["inspect-data", str(tmp_path / "run"), "--document", "a:d99"]) == 3


def test_an_id_that_occurs_many_times_names_all_its_documents(tiny_words, prepared, tmp_path, capsys):
    lines = [json.dumps({"id": "dup" if i % 3 == 0 else f"d{i}", "text": f"w{i} " * (i + 1)}) for i in range(12)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    data = ["prepare-data", tmp_path / "in.jsonl", "--output", tmp_path / "dups", "--tokenizer", prepared, "--workers", 1]
    assert main([str(word) for word in data]) == 0
    words = run_words(tiny_words, tmp_path / "dups", total_steps=9)
    shown = inspect(capsys, *words, "--document", "a:dup")
    assert [d["origin"].rpartition(":")[2] for d in shown["documents"]] == ["1", "4", "7", "10"]
    assert shown["document"] == shown["documents"][0] and shown["visits"] == sorted(
        shown["visits"], key=lambda visit: (visit["step"], visit["row"]))  # fmt: skip
    for d in shown["documents"]:
        alone = inspect(capsys, *words, "--document", f"a:@{d['start']}")
        assert alone["visits"] == [visit for visit in shown["visits"] if visit["start"] == d["start"]]
        assert len(alone["visits"]) == d["reads"] > 0
    assert main(["inspect-data", *words, "--document", "a:dup"]) == 0
    assert "a:dup is the id of 4 documents" in capsys.readouterr().out
    for id, fix in (("d100", "did you mean 'd10'"), ("Dup", "did you mean 'dup'?"), ("quite another", "an id of it is 'dup'")):
        assert main(["inspect-data", *words, "--document", f"a:{id}"]) == 3
        assert f"knows no document '{id}'; {fix}" in capsys.readouterr().err


def events(run_dir: Path, words: list[str], *attempts) -> None:
    """A run_dir as a run leaves it: attempts are (step that it went on from, world size, changed keys)."""
    run_dir.mkdir()
    lines = []
    for step, world_size, changed in attempts:
        resolved = config.read([], [*words, *changed])
        event = {"event": "resume", "step": step, "world_size": world_size, "config": resolved}
        lines += [json.dumps(event), json.dumps({"event": "save", "step": step + 1})]
    (run_dir / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "re')
    (run_dir / "config.yaml").write_text(json.dumps(resolved))


def test_a_step_is_inspected_with_the_ranks_and_the_configuration_that_made_it(tiny_words, tmp_path):
    seed = ["data.seed=9"]
    events(tmp_path / "run", tiny_words(), (0, 2, []), (5, 4, []), (8, 1, seed), (6, 8, seed))
    run = History(tmp_path / "run")
    assert [(a.first_step, a.world_size, a.config.data.seed) for a in run.attempts] == [(1, 2, None), (6, 4, None), (7, 8, 9)]
    assert [run.attempt_of(step).world_size for step in (1, 5, 6, 7, 12)] == [2, 2, 4, 8, 8]
    for step in (0, 13):
        with pytest.raises(ConfigError):
            run.attempt_of(step)


def test_visits_of_a_run_whose_order_changed_are_those_of_each_attempt(tiny_words, prepared, tmp_path, capsys):
    words = run_words(tiny_words, prepared)
    events(tmp_path / "run", words, (0, 2, []), (6, 4, ["data.seed=9"]))
    shown = inspect(capsys, tmp_path / "run", "--document", "a:d29")["visits"]
    expected = []
    for step in range(1, 13):
        rows = inspect(capsys, tmp_path / "run", "--step", step)["instances"]
        expected += [(step, r["row"], r["rank"]) for r in rows if any(d["id"] == "d29" for d in r["documents"])]
    assert [(v["step"], v["row"], v["rank"]) for v in shown] == expected
    assert {step > 6 for step, _, _ in expected} == {True, False}


def test_data_that_was_moved_is_found_where_the_configuration_says_now(tiny_words, tiny_tokens, tmp_path, capsys):
    old = [f"data.sources.a.path={tmp_path}/gone.npy"]
    events(tmp_path / "run", tiny_words(), (0, 1, old), (6, 1, []))
    assert len(inspect(capsys, tmp_path / "run", "--step", 3)["instances"]) == 8


def test_an_order_that_differs_from_the_logged_one_is_reported(tiny_words, tiny_tokens, tmp_path, capsys, caplog):
    events(tmp_path / "run", tiny_words(), (0, 1, []))
    lines = [json.dumps({"step": s, "sample_hash": "0" * 64, "more": "y" * (s * 37 % 91)}) for s in range(2, 13, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [inspect(capsys, tmp_path / "run", "--step", s)["as_logged"] for s in range(1, 13)] == [None, False] * 6
    assert "another sample_hash for step 2" in caplog.text
    assert History(tmp_path / "run").last_step() == 12


def test_a_run_of_an_earlier_version_is_inspected_whatever_else_it_was_configured_with(tiny_words, tiny_tokens, tmp_path, capsys):
    old = ["log.gone=1", "parallel.shard=as_it_was_called", "gone.too=2", "guards.skip_steps=[3]", "guards.gone=4"]
    events(tmp_path / "run", tiny_words(total_steps=None, total_tokens=12 * 8 * 64), (0, 2, old))
    for step in (3, 12):
        shown = inspect(capsys, tmp_path / "run", "--step", step)
        assert (shown["world_size"], shown["passed_over"]) == (2, step == 3)
    assert main(["inspect-data", str(tmp_path / "run"), "--step", "13"]) == 2
    assert main(["inspect-data", str(tmp_path / "run"), "--step", "1", "data.gone=5"]) == 2
    assert "data.gone: is not a known key" in capsys.readouterr().err


def test_three_trillion_tokens_are_inspected_at_once_and_without_torch(tmp_path):
    for i in range(3):
        with open(tmp_path / f"part-{i}.npy", "wb") as file:
            file.truncate(2_000_000_000_000)  # sparse: takes no room
    code = (
        "import sys; from olmo_train.__main__ import main; code = main(sys.argv[1:]);"
        "assert not [name for name in ('torch', 'pandas', 'wandb') if name in sys.modules]; sys.exit(code)"
    )
    words = ["inspect-data", f"data.sources.big.path={tmp_path}/part-*.npy", "total_steps=700000", "--step", "600000", "--json"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["instances"]
    assert len(rows) == 2048 and max(row["instance"] for row in rows) > 10**9
    assert seconds < 30  # it takes a third of a second; an index or a list of instances would take minutes


def test_a_folder_that_is_no_run_is_exit_2(tmp_path, capsys):
    assert main(["inspect-data", str(tmp_path), "--step", "1"]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_raw_files_name_documents_by_their_place(tiny_words, capsys):
    rows = inspect(capsys, *tiny_words(**{"data.eos_id": EOS_ID}), "--step", 1)["instances"]
    start = rows[0]["documents"][0]["start"]
    shown = inspect(capsys, *tiny_words(**{"data.eos_id": EOS_ID}), "--document", f"a:@{start}")
    assert shown["document"]["start"] == start and (shown["visits"][0]["step"], shown["visits"][0]["done"]) == (1, False)

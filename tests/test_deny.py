"""data.deny: the tokens of denied documents are no labels, in any order of the data and on any number of ranks; else
nothing changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from test_inspect import inspect, prepared, run_words  # noqa: F401

from olmo_train import config
from olmo_train.__main__ import main
from olmo_train.checkpoint.folders import newest_folder, read_state
from olmo_train.data.config import DataConfig, SourceConfig
from olmo_train.data.loader import IGNORE, read_batch
from olmo_train.data.mixture import Mixture
from olmo_train.data.prepare.documents import DocumentParts
from olmo_train.errors import ConfigError, DataError
from olmo_train.train import train
from olmo_train.train_config import TrainConfig

T, BATCH = 16, 6
EOS = 999


def raw(tmp_path, name="a") -> Path:
    """2,000 tokens, each its own place below 900 (the rest repeats), of documents of 49 tokens and an EOS."""
    ids = np.arange(2000) % 900
    ids[49::50] = EOS
    file = tmp_path / f"{name}.npy"
    ids.astype("<u2").tofile(file)
    return file


def mixture_of(sources, order="permute", **options) -> Mixture:
    return Mixture(DataConfig({k: SourceConfig(str(v)) for k, v in sources.items()}, order, **options), 1, BATCH, T, 60_000)


def scored(mixture: Mixture, batch) -> np.ndarray:
    """(rows, labels) the places in the stream of what is predicted, where the label is scored, else -1."""
    shifts = np.arange(1, batch.labels.shape[1] + 1)
    whole = mixture.global_batch(1)
    places = np.array([mixture.span(int(s), int(i))[0] + shifts for s, i in zip(whole.source, whole.instance, strict=True)])
    return np.where(batch.labels.numpy() == IGNORE, -1, places)


@pytest.mark.parametrize("order", ["permute", "olmo"])
@pytest.mark.parametrize("document_mask", [False, True])
def test_exactly_the_tokens_of_denied_documents_are_no_labels(prepared, order, document_mask):  # noqa: F811
    sources = {"p": prepared, "q": prepared}
    plain = mixture_of(sources, order, document_mask=document_mask)
    mixture = mixture_of(sources, order, document_mask=document_mask, deny=("p:d7", "p:d8", "q:d20", "p:@0"))
    table = {d.id: d for d in plain.sources[0].documents(0, plain.sources[0].n_tokens)}
    first = plain.sources[0].documents(0, 1)[0]
    hidden_spans = {0: [table["d7"], table["d8"], first], 1: [table["d20"]]}
    hidden = 0
    for step in range(1, 60):
        one, other = (read_batch(m, step, 0, 1) for m in (plain, mixture))
        assert torch.equal(one.input_ids, other.input_ids) and one.sample_hash == other.sample_hash
        whole = plain.global_batch(step)
        for row, (source, instance) in enumerate(zip(whole.source.tolist(), whole.instance.tolist(), strict=True)):
            places = plain.span(source, instance)[0] + 1 + np.arange(T)
            denied = np.zeros(T, dtype=bool)
            for d in hidden_spans[source]:
                denied |= (places >= d.start) & (places <= d.end)  # its EOS is at d.end
            expected = one.labels[row].masked_fill(torch.from_numpy(denied), IGNORE)
            assert torch.equal(other.labels[row], expected)
            hidden += int(denied.sum())
        parts = [read_batch(mixture, step, rank, 2).labels for rank in range(2)]
        assert torch.equal(torch.cat(parts), other.labels)
    assert hidden > 3 * T


def test_documents_of_raw_files_are_denied_by_a_place_in_them(tmp_path):
    file = raw(tmp_path)
    mixture = mixture_of({"a": file}, deny=("a:@120", "a:@149", "a:@1999"), eos_id=EOS)
    assert list(zip(mixture.denied[0].starts, mixture.denied[0].ends, strict=True)) == [(100, 150), (1950, 2000)]
    np.arange(30, dtype="<u2").tofile(short := tmp_path / "a0.npy")  # ends without an EOS
    two = Mixture(DataConfig({"a": SourceConfig((str(short), str(file)))}, deny=("a:@7",), eos_id=EOS), 1, BATCH, T, 60_000)
    assert (two.denied[0].starts.tolist(), two.denied[0].ends.tolist()) == ([0], [30])
    with pytest.raises(ConfigError, match="data.eos_id: is needed to separate the documents of a,"):
        mixture_of({"a": file}, deny=("a:@120",))
    with pytest.raises(DataError, match=r"data.deny: a: is made of raw token files.*'d1'.*a:@N for the one that holds token N"):
        mixture_of({"a": file}, deny=("a:d1",), eos_id=EOS)


def test_a_list_in_a_file_is_the_same_as_its_words(prepared, tmp_path):  # noqa: F811
    (tmp_path / "bad.txt").write_text("\ufeffa:d3\n\n  a:d5 \n", encoding="utf-8")  # as editors on Windows write it
    listed, named = (mixture_of({"a": prepared}, deny=deny) for deny in ((str(tmp_path / "bad.txt"),), ("a:d5", "a:d3", "a:d3")))
    assert listed.denied_summary == named.denied_summary and listed.denied_summary["documents"] == {"a": 2}
    assert mixture_of({"a": prepared}).denied_summary is None
    assert mixture_of({"a": prepared}, deny=("a:d3", "a:d6")).denied_summary["sha256"] != named.denied_summary["sha256"]


def test_an_id_that_occurs_twice_denies_both(tmp_path):
    from olmo_train.data.documents import DocumentTable

    (tmp_path / "work").mkdir()
    parts = DocumentParts(tmp_path / "work", 0)
    for shard, ids in ((0, ["x", "y", "x"]), (1, ["z", "x"])):
        starts = np.arange(len(ids)) * 10
        parts.add(shard, ids, starts, starts + 9, ["f"] * len(ids), [None] * len(ids))
    parts.save()
    parts.merge(tmp_path, [30, 20])
    table = DocumentTable(tmp_path)
    assert [d.start for d in table.find({"x", "z"}, [0, 30, 50])] == [0, 20, 30, 40]
    with pytest.raises(DataError, match="knows no document 'w'"):
        table.find({"x", "w"}, [0, 30, 50])


@pytest.mark.parametrize(
    "word, message",
    [
        ("a:nothing", r"data.deny: .*documents.parquet: knows no document 'nothing'.*leave it out"),
        ("a:@99999", r"data.deny: a: has [\d,]+ tokens, so there is none at 99999"),
        ("aa:d1", "data.deny: 'aa:d1' is of the source 'aa', which is not in data.sources; did you mean 'a'"),
        ("missing.txt", "data.deny: 'missing.txt' is neither SOURCE:ID nor a file"),
        ("LIST", r"data.deny: .*list.txt:2: 'd2' is neither SOURCE:ID nor a file"),
        ("BINARY", r"data.deny: the list .*binary cannot be read"),
    ],
)
def test_words_that_name_nothing_are_refused(prepared, tmp_path, word, message):  # noqa: F811
    (tmp_path / "list.txt").write_text("a:d1\nd2\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    word = {"LIST": str(tmp_path / "list.txt"), "BINARY": str(tmp_path / "binary")}.get(word, word)
    with pytest.raises((ConfigError, DataError), match=message):
        mixture_of({"a": prepared}, deny=(word,))


def built(words):
    return config.load(TrainConfig, [], words)


def counted_tokens(a_config, world=None) -> list[float]:
    return [float(stats.sums[1].sum()) for stats in train(a_config, world)]


def test_the_loss_is_divided_by_what_is_left_on_one_rank_and_on_two(tiny_words, prepared, tmp_path, read_metrics):  # noqa: F811
    changes = {"total_steps": 4, "micro_batch_size": 2}
    changes |= {"data.deny": "[a:d7,a:d11,a:d29]"}
    one, two, plain = (
        built(run_words(tiny_words, prepared, **changes | {"run_dir": tmp_path / name} | more))
        for name, more in (("one", {}), ("two", {}), ("plain", {"data.deny": None}))
    )
    mixture = Mixture(one.data, one.seed, one.global_batch_size, one.model.seq_len, one.model.vocab_size)
    expected = [float((read_batch(mixture, step, 0, 1).labels != IGNORE).sum()) for step in range(1, 5)]
    assert counted_tokens(one) == expected and min(expected) < 8 * 16 == counted_tokens(plain)[0]

    def run(world):
        return counted_tokens(two, world)

    assert on_ranks(2, run) == [expected] * 2
    lines = [read_metrics(c.run_dir) for c in (one, two, plain)]
    assert [[line["sample_hash"] for line in of] for of in lines] == [[line["sample_hash"] for line in lines[0]]] * 3
    losses = [[line["train/CrossEntropyLoss"] for line in of] for of in lines]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] != pytest.approx(losses[2], abs=1e-3)


def test_a_resumed_run_denies_the_same_or_says_so(tiny_words, prepared, tmp_path):  # noqa: F811
    (listed := tmp_path / "bad.txt").write_text("a:d7\n")
    words = run_words(tiny_words, prepared, total_steps=2)
    list(train(built([*words, f"data.deny=[{listed}]"])))
    longer = run_words(tiny_words, prepared, total_steps=3)
    message = "data.deny: denies {} now and denied 1 document of a{} when this run was saved, .*allow_changes=.data.deny."
    with pytest.raises(ConfigError, match=message.format("nothing", "")):
        list(train(built(longer)))
    listed.write_text("a:d8\n")  # the words are the same, the documents are not
    with pytest.raises(ConfigError, match=message.format("1 document of a", " others")):
        list(train(built([*longer, f"data.deny=[{listed}]"])))
    assert len(list(train(built([*longer, "data.deny=[a:d7]"])))) == 1  # the same document, named elsewhere
    longer = run_words(tiny_words, prepared, total_steps=4)
    assert len(list(train(built([*longer, "data.deny=[a:d7,a:d9]", "allow_changes=[data.deny]"])))) == 1
    assert read_state(newest_folder(tmp_path / "run"))["denied"]["documents"] == {"a": 2}


def test_inspect_data_marks_denied_documents(tiny_words, prepared, capsys):  # noqa: F811
    words = [*run_words(tiny_words, prepared), "data.deny=[a:d7]"]
    printed = inspect(capsys, *words, "--step", 1)
    marks = {d["id"]: d["denied"] for step in range(1, 9) for row in inspect(capsys, *words, "--step", step)["instances"]
             for d in row["documents"]}  # fmt: skip
    assert [id for id, denied in marks.items() if denied] == ["d7"] and len(marks) > 5
    assert printed["sample_hash"] == inspect(capsys, *words[:-1], "--step", 1)["sample_hash"]
    document = inspect(capsys, *words, "--document", "a:d7")
    assert document["document"]["denied"] is True and document["visits"]
    step = document["visits"][0]["step"]
    assert main(["inspect-data", *words, "--document", "a:d7"]) == 0
    assert "data.deny denies it" in capsys.readouterr().out
    assert main(["inspect-data", *words, "--step", str(step)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert sum("denied)" in line for line in shown) == sum(visit["step"] == step for visit in document["visits"])

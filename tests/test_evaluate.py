"""evaluate: the numbers of the evaluation inside the run, and the two models that any language model must beat."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import EOS_ID, markov_stream, words_of
from runs import trained

from olmo_train import config
from olmo_train.__main__ import main
from olmo_train.data.config import SourceConfig
from olmo_train.data.shards import open_source
from olmo_train.eval.perplexity import mixed_counts, token_counts, unigram_loss
from olmo_train.train_config import TrainConfig


def token_file(path, ids) -> str:
    np.array(ids, dtype="<u2").tofile(path)
    return str(path)


@pytest.fixture(scope="module", params=[False])
def finished_run(request, tmp_path_factory, stream):
    """A run of four steps with two validation sources, the second with a ragged end, beside its token files; the parameter is
    data.document_mask."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "tokens.npy").write_bytes(stream)
    files = [token_file(folder / f"{name}.npy", markov_stream(size, seed=2)) for name, size in (("x", 641), ("y", 333))]
    changes = {"data.validation.x.path": files[0], "data.validation.y.path": files[1]}
    changes |= {"data.document_mask": request.param, "data.eos_id": EOS_ID, "total_steps": 4}
    trained(config.load(TrainConfig, [], words_of(folder / "run", folder / "tokens.npy", **changes)))
    return folder / "run"


@pytest.mark.parametrize("finished_run", [False, True], indirect=True)
def test_the_numbers_are_those_of_the_evaluation_inside_the_run(finished_run, read_metrics, capsys):
    logged = read_metrics(finished_run)[-1]
    for words in (["--batch-size", "1"], ["--batch-size", "7"], []):
        assert main(["evaluate", str(finished_run), "--json", *words]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["step"] == 4 and list(result["sources"]) == ["x", "y"]
        for name, tokens in (("x", 640), ("y", 332)):
            measured = result["sources"][name]
            assert measured["tokens"] == tokens
            assert measured["loss"] == pytest.approx(logged[f"eval/{name}/CrossEntropyLoss"], rel=1e-6)
            assert measured["perplexity"] == pytest.approx(logged[f"eval/{name}/Perplexity"], rel=1e-5)
            assert measured["uniform_loss"] == math.log(512)


def test_the_perplexity_is_that_of_the_exported_model_in_transformers(finished_run, tmp_path, capsys):
    import transformers

    assert main(["convert", "export-hf", str(finished_run), str(tmp_path / "theirs")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(finished_run), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["sources"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    for name in ("x", "y"):
        tokens = torch.from_numpy(np.fromfile(finished_run.parent / f"{name}.npy", "<u2").astype(np.int64))
        instances = [tokens[i : i + 65] for i in range(0, len(tokens) - 1, 64)]
        with torch.no_grad():
            losses = [theirs(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1) for ids in instances]
        assert ours[name]["perplexity"] == pytest.approx(math.exp(sum(losses) / (len(tokens) - 1)), rel=1e-5)


def test_a_folder_and_other_data_can_be_named(finished_run, tiny_tokens, tmp_path, capsys):
    folder = finished_run / "checkpoints/step-0000004"
    output = tmp_path / "new/result.json"
    assert main(["evaluate", str(folder), "--data", f"z={tiny_tokens}", "--output", str(output), "--no-unigram"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())["sources"]["z"]
    assert result["tokens"] == 39_999 and result["unigram_loss"] is None
    assert "z" in printed and f"{result['loss']:.4f}" in printed


def test_the_unigram_loss_is_that_of_the_training_datas_frequencies(finished_run, capsys):
    assert main(["evaluate", str(finished_run), "--json"]) == 0
    counts = np.bincount(np.fromfile(finished_run.parent / "tokens.npy", "<u2"), minlength=512) + 1
    labels = np.fromfile(finished_run.parent / "x.npy", "<u2")[1:]
    expected = -np.log(counts / counts.sum())[labels].mean()
    assert json.loads(capsys.readouterr().out)["sources"]["x"]["unigram_loss"] == pytest.approx(expected, rel=1e-9)


def test_a_checkpoint_is_evaluated_without_its_training_data(finished_run, capsys, caplog):
    tokens = finished_run.parent / "tokens.npy"
    moved = tokens.rename(tokens.with_name("moved.npy"))
    assert main(["evaluate", str(finished_run), "--json"]) == 0
    moved.rename(tokens)
    assert json.loads(capsys.readouterr().out)["sources"]["x"]["unigram_loss"] is None
    assert "tokens.npy" in caplog.text


@pytest.mark.parametrize("words, code, message", [
    (["--data", "nothing"], 2, "NAME=PATH"), (["--data", "z=none.npy"], 3, "none.npy"), (["--device", "abacus"], 2, "abacus"),
])  # fmt: skip
def test_wrong_words_are_one_error_line(finished_run, capsys, words, code, message):
    assert main(["evaluate", str(finished_run), *words]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_no_checkpoint_is_exit_4(tmp_path):
    assert main(["evaluate", str(tmp_path)]) == 4


def open_tokens(path, ids):
    return open_source(path.stem, SourceConfig(token_file(path, ids)), vocab_size=8)


def test_sources_count_as_often_as_they_are_read(tmp_path):
    a, b = open_tokens(tmp_path / "a.npy", [1] * 30 + [2] * 10), open_tokens(tmp_path / "b.npy", [3] * 60)
    assert mixed_counts([a, b], np.array([3.0, 1.0]), 8).tolist() == [0, 56.25, 18.75, 25, 0, 0, 0, 0]


def test_the_unigram_loss_of_equal_frequencies_is_the_uniform_loss():
    assert unigram_loss(np.full(8, 5), np.array([1, 0, 4, 0, 0, 0, 0, 2])) == pytest.approx(math.log(8))


def test_a_large_source_is_counted_in_evenly_spread_chunks(tmp_path):
    source = open_tokens(tmp_path / "a.npy", [1] * 500 + [2] * 500)
    assert token_counts(source, 8, chunk=10).tolist() == [0, 500, 500, 0, 0, 0, 0, 0]
    assert token_counts(source, 8, most=100, chunk=10).tolist() == [0, 50, 50, 0, 0, 0, 0, 0]

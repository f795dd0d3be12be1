"""One model, one tokenizer: whatever else meets a model's data is refused with both names and hashes, unless it is allowed."""

import hashlib
import json

import pytest
from data_sources import WORDS, prepare_source, texts

from olmo_train.__main__ import main
from olmo_train.data.config import DataConfig, SourceConfig
from olmo_train.data.mixture import Mixture
from olmo_train.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from olmo_train.errors import DataError
from olmo_train.eval import during_run
from olmo_train.plan.plan import open_data
from olmo_train.tools import doctor
from olmo_train.train import train


@pytest.fixture
def two(tmp_path):
    """Two folders, prepared with two tokenizers of the same size, and those tokenizers."""
    files = [tmp_path / "ours.json", tmp_path / "theirs.json"]
    save_tokenizer(train_tokenizer(texts(50), 280), files[0])
    save_tokenizer(train_tokenizer([word[::-1] * 3 for word in WORDS], 280), files[1])
    folders = []
    for name, file in zip("ab", files, strict=True):
        (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
        folders.append(prepare_source(tmp_path, name=name)[0])
    return folders, files


def refused(action, two) -> None:
    """The error has exit code 3 and names both tokenizers with the beginnings of their hashes."""
    with pytest.raises(DataError) as problem:
        action()
    for file in two[1]:
        assert hashlib.sha256(file.read_bytes()).hexdigest()[:12] in str(problem.value), problem.value
    assert str(problem.value).count(".json (sha256") == 2


def mixture(*paths, validation=(), check=True) -> Mixture:
    sources, held_out = (
        {f"{name}{i}": SourceConfig(str(p)) for i, p in enumerate(ps)} for name, ps in (("s", paths), ("v", validation))
    )
    return Mixture(DataConfig(sources, eos_id=None, validation=held_out, check_tokenizer=check), 0, 2, 16, 512)


def test_sources_and_validation_data_of_another_tokenizer_are_refused(two, caplog):
    a, b = two[0]
    refused(mixture(a, b).check_tokenizers, two)
    held_out = mixture(a, validation=[b])
    refused(lambda: held_out.check_tokenizers(held_out.open_validation()), two)
    mixture(a, a).check_tokenizers(mixture(a, validation=[a]).open_validation())
    assert not caplog.records
    mixture(a, b, check=False).check_tokenizers()
    assert "data.sources.s1: was made with the tokenizer" in caplog.text


def test_raw_token_files_have_nothing_to_compare(two, tiny_tokens):
    mixture(two[0][0], tiny_tokens).check_tokenizers()
    mixture(tiny_tokens, two[0][1]).check_tokenizers()


def run_words(tiny_args, source, name="run", **changes):
    keys = {"data.sources.a.path": source, "total_steps": 1, "model.n_layers": 1, "model.seq_len": 16, "global_batch_size": 4}
    return tiny_args(name, **keys | changes)


def test_a_run_refuses_them_before_it_makes_its_run_dir(two, tiny_args, tmp_path, monkeypatch):
    a, b = two[0]
    for key in ("data.sources.b.path", "data.validation.v.path"):
        refused(lambda key=key: list(train(run_words(tiny_args, a, **{key: b}))), two)
    monkeypatch.setattr(during_run, "load_task", lambda *_: None)
    tasks = {"eval.downstream": "[piqa]", "eval.tokenizer": two[1][1]}
    refused(lambda: list(train(run_words(tiny_args, a, **tasks))), two)
    assert not (tmp_path / "run").exists()
    allowed = run_words(tiny_args, a, **{"data.sources.b.path": b, "data.check_tokenizer": False})
    assert len(list(train(allowed))) == 1


def test_weights_of_another_tokenizer_are_refused(two, tiny_args, tmp_path):
    a, b = two[0]
    list(train(run_words(tiny_args, a, "first")))
    for key in ("init_from", "resume_from"):
        refused(lambda key=key: list(train(run_words(tiny_args, b, key, total_steps=2, **{key: tmp_path / "first"}))), two)
    assert len(list(train(run_words(tiny_args, b, "fine", init_from=tmp_path / "first", **{"data.check_tokenizer": False})))) == 1


def test_doctor_and_plan_report_them(two, tiny_args):
    a, b = two[0]
    for key in ("data.sources.b.path", "data.validation.v.path"):
        findings = doctor.examine(run_words(tiny_args, a, **{key: b}))
        assert [f.check for f in findings if f.status == "problem"] == [key.removesuffix(".path")], findings
    opened, why_not = open_data(run_words(tiny_args, a, **{"data.sources.b.path": b}))
    assert opened is None and "theirs" not in why_not and "data.check_tokenizer=false" in why_not


@pytest.mark.parametrize("verb", ["evaluate --data x={b} --no-unigram", "generate --max-new-tokens 2 --tokenizer {tokenizer}",
                                  "convert export-hf {dest} --tokenizer {tokenizer}"])  # fmt: skip
def test_the_verbs_of_a_checkpoint_refuse_and_allow_them(verb, two, tiny_args, tmp_path, capsys, caplog):
    list(train(run_words(tiny_args, two[0][0])))
    name, *rest = verb.format(b=two[0][1], tokenizer=two[1][1], dest=tmp_path / "out").split()
    words = [name, *rest[:1], str(tmp_path / "run"), *rest[1:]] if name == "convert" else [name, str(tmp_path / "run"), *rest]
    assert main(words) == 3
    message = capsys.readouterr().err
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in two[1]]
    assert all(digest in message for digest in hashes) and "--allow-other-tokenizer" in message
    assert main([*words, "--allow-other-tokenizer"]) == 0
    assert all(digest in caplog.text for digest in hashes)


def test_the_tokenizer_of_a_checkpoint_is_compared_by_its_contents(two, tiny_args, tmp_path):
    list(train(run_words(tiny_args, two[0][0])))
    copy = tmp_path / "under-another-name.json"
    copy.write_bytes(two[1][0].read_bytes())
    assert json.loads(copy.read_text())["model"]["type"] == "BPE"
    assert main(["generate", str(tmp_path / "run"), "--max-new-tokens", "2", "--tokenizer", str(copy)]) == 0


def test_a_checkpoint_keeps_the_eos_of_its_data(tiny_args, tmp_path, capsys):
    source, _ = prepare_source(tmp_path, eos="<|padding|>")
    list(train(run_words(tiny_args, source)))
    assert load_tokenizer(next((tmp_path / "run/checkpoints").glob("step-*"))).eos_text == "<|padding|>"
    assert main(["generate", str(tmp_path / "run"), "--max-new-tokens", "2", "--eos", "nothing"]) == 3
    assert "has no token 'nothing' to end a document" in capsys.readouterr().err

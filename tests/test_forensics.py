"""A bad step leaves evidence: the document at fault, the loss of each sequence, the norm of each gradient."""

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from data_sources import prepare_source
from ranks import on_ranks
from runs import first_quick, trained
from test_guards import EVERY, poison
from test_rewind import SPIKE, spiking  # noqa: F401, a fixture

from olmo_train.checkpoint.load import load_model
from olmo_train.errors import NonFiniteError
from olmo_train.guards import forensics
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import shard
from olmo_train.train import train


@pytest.fixture
def poisoned_args(tiny_args, tmp_path):
    """poisoned_args(name, **changes): runs on prepared documents, of which `the-bad-one` holds words that no other has."""
    rows = [{"id": f"doc-{i}", "text": f"the cat sat on a mat and ran to his naïve mat {i} " * 4} for i in range(120)]
    rows[57] = {"id": "the-bad-one", "text": "the cat sat on a §§§§ mat and ran to his mat " * 2}
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, _ = prepare_source(tmp_path, tmp_path / "docs.jsonl", max_shard_tokens=100_000)
    changes = {"data.sources.a.path": folder, "model.vocab_size": None, "model.padded_vocab_size": None}

    def args(name, **more):
        return tiny_args(name, **changes | {"model.vocab_size": 280, "model.padded_vocab_size": 280} | EVERY | more)

    return args


def spoil_tokens(ids):
    """From now on, in this process, the embedding of these tokens is NaN."""
    real = Transformer.forward

    def forward(self, input_ids, *args, **kwargs):
        def hook(embed, inputs, output):
            return output.masked_fill(torch.isin(inputs[0], torch.tensor(ids))[..., None], math.nan)

        handle = self.embed.register_forward_hook(hook)
        try:
            return real(self, input_ids, *args, **kwargs)
        finally:
            handle.remove()

    Transformer.forward = forward


def bad_tokens(folder: Path) -> list[int]:
    """The ids of the letter that only the bad document has; the first of its two bytes is shared with others."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    others = set(tokenizer.encode("the cat sat on a mat and ran to his naïve mat 0123456789").ids)
    return sorted(set(tokenizer.encode("§").ids) - others)


def folders(config) -> list[Path]:
    return sorted((Path(config.run_dir) / "forensics").glob("*"))


def read(folder: Path, name: str = "step.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_poisoned_document_is_named_first(poisoned_args, ranks):
    config = poisoned_args("run", **{"total_steps": 12, "guards.max_skipped": 12})
    ids = bad_tokens(Path(config.data.sources["a"].path))
    assert ids

    def run(world):
        spoil_tokens(ids)
        return [stats.step for stats in train(config, world) if stats.skipped]

    skipped, *others = on_ranks(ranks, run)
    assert skipped and all(other == skipped for other in others)
    assert [folder.name for folder in folders(config)] == [f"step-{step:07d}" for step in skipped]
    for folder in folders(config):
        report = read(folder)
        assert (report["why"], report["done"], report["loss"], report["world_size"]) == ("skip", "skip", "nan", ranks)
        first = report["sequences"][0]
        bad = next(d for d in first["documents"] if d["id"] == "the-bad-one")
        assert first["loss"] == "nan" and "docs.jsonl" in bad["origin"] and "cat" in bad["text"]
        assert first["rank"] == first["row"] // (8 // ranks)
        finite = [s for s in report["sequences"] if s["loss"] != "nan"]
        assert finite and all("the-bad-one" not in [d["id"] for d in s["documents"] if "§" in d["text"]] for s in finite)
        assert [s["loss"] for s in finite] == sorted((s["loss"] for s in finite), reverse=True)
        readme = (folder / "README.txt").read_text()
        assert "document the-bad-one of" in readme and f"Step {report['step']} has a loss that" in readme


def test_what_a_spike_leaves_agrees_with_the_record(spiking, read_metrics):  # noqa: F811
    config = trained(spiking("run", "record"))
    (folder,) = folders(config)
    report, norms = read(folder), read(folder, "gradients.json")
    line = read_metrics(config.run_dir)[SPIKE - 1]
    assert folder.name == f"step-{SPIKE:07d}" and (report["why"], report["done"]) == ("spike", "record")
    assert report["loss"] == line["train/CrossEntropyLoss"] and report["sample_hash"] == line["sample_hash"]
    assert report["grad_norm"] == norms["total"] == line["optim/total_grad_norm"]
    assert math.hypot(*norms["parameters"].values()) == pytest.approx(norms["total"], rel=1e-5)
    assert len(norms["parameters"]) > 8 and "embed.weight" in norms["parameters"]
    assert sum(s["loss"] for s in report["sequences"]) / 8 == pytest.approx(report["loss"], rel=1e-6)
    assert all(d["tokens"] for s in report["sequences"] for d in s["documents"])  # raw files have no text
    assert report["environment"]["torch"] == torch.__version__ and report["environment"]["ranks"][0]["device"] == "cpu"


@pytest.mark.parametrize("determinism", first_quick([None, "world"]))
def test_the_norms_of_two_ranks_are_those_of_the_whole_gradients(tiny_args, determinism):
    def run(world):
        changes = {"micro_batch_size": 1} if determinism == "world" else {}
        config = tiny_args(f"run-{world.size}", total_steps=2, determinism=determinism, **changes)
        return [shard.full_tensor(stats.norms[1]).tolist() for stats in train(config, world)]

    (one,), (two, same) = on_ranks(1, run), on_ranks(2, run)
    assert two == same
    for mine, other in zip(one, two, strict=True):
        assert mine == other if determinism == "world" else mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("determinism", [None, "world"])
def test_a_frozen_parameter_ends_no_run(tiny_args, monkeypatch, determinism):
    """Through a skipped step, a save and a resume; it keeps its first values."""
    real = shard.shard

    def frozen_shard(model, *args):
        model.embed.weight.requires_grad_(False)
        return real(model, *args)

    monkeypatch.setattr(shard, "shard", frozen_shard)
    poison(2, math.nan, monkeypatch)
    changes = EVERY | {"checkpoint.interval_steps": 3, "determinism": determinism, "micro_batch_size": 1}
    config = tiny_args("run", **changes | {"total_steps": 3})
    losses = [stats.loss.item() for stats in train(config)]
    (folder,) = folders(config)
    norms = read(folder, "gradients.json")["parameters"]
    assert "embed.weight" not in norms and norms["blocks.1.mlp.w_down.weight"] == ("inf" if determinism else "nan")
    losses += [stats.loss.item() for stats in train(tiny_args("run", **changes))]
    assert losses[-1] < losses[0]
    embed = load_model(config.run_dir).embed.weight
    assert torch.equal(embed, initial_value("embed.weight", embed.shape, config.model, config.seed))


def test_a_gradient_alone_that_is_not_finite_is_named(tiny_args, monkeypatch):
    poison(4, math.inf, monkeypatch)
    config = trained(tiny_args("run", **EVERY))
    (folder,) = folders(config)
    norms = read(folder, "gradients.json")["parameters"]
    assert [name for name, norm in norms.items() if norm == "inf"] == ["blocks.1.mlp.w_down.weight"]
    readme = (folder / "README.txt").read_text()
    assert "not finite: 1 of" in readme and re.search(r"inf +blocks\.1\.mlp\.w_down\.weight", readme)
    assert "has a gradient that is not finite" in readme and "of 8, all of them finite" in readme


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_the_evidence_is_there_before_the_run_ends_or_goes_back(spiking, policy):  # noqa: F811
    config = spiking("run", policy, **{"guards.max_rewinds": 1, "total_steps": 9})
    expected = pytest.raises(NonFiniteError, match=r"look at \S+/forensics/step-0000008/README.txt; run again")
    with expected if policy == "stop" else nullcontext():
        trained(config)
    (folder,) = folders(config)
    assert read(folder)["done"] == policy


def test_too_many_skipped_steps_name_the_evidence_of_the_last(tiny_args, monkeypatch):
    poison((3, 4), math.nan, monkeypatch)
    with pytest.raises(NonFiniteError, match=r"look at \S+/forensics/step-0000004/README.txt; lower"):
        trained(tiny_args("run", **{"guards.max_skipped": 2}))


def test_a_healthy_run_leaves_none(tiny_args):
    config = trained(tiny_args("run", total_steps=4))
    assert folders(config) == [] and not (Path(config.run_dir) / "forensics").exists()


def test_a_full_disk_is_a_warning(tiny_args, monkeypatch, caplog):
    poison((3, 5), math.nan, monkeypatch)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forensics, "write_file", full)
    config = tiny_args("run", total_steps=6)
    assert [stats.step for stats in train(config)] == [1, 2, 3, 4, 5, 6]
    assert "forensics of step 3 could not be written: No space left on device" in caplog.text
    assert folders(config) == []


def test_folders_are_limited_and_the_limit_is_reported_once(tiny_args, monkeypatch, caplog):
    monkeypatch.setattr(forensics, "MOST_FOLDERS", 2)
    poison((2, 3, 4, 5), math.nan, monkeypatch)
    config = trained(tiny_args("run", total_steps=6))
    assert [folder.name for folder in folders(config)] == ["step-0000002", "step-0000003"]
    assert caplog.text.count("no more are written") == 1

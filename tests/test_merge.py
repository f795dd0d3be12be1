"""checkpoints RUN --merge: the mean of weights is numpy's in fp64, rounded once, and is committed as any checkpoint."""

import ctypes
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, markov_stream, words_of
from crash import Death, Disk
from data_sources import contents, prepare_source
from ranks import exit_code, fork
from runs import cut, first_quick, lines_of, trained, trained_on

from olmo_train import config as configuration
from olmo_train.__main__ import main
from olmo_train.checkpoint import folders, load
from olmo_train.checkpoint.load import load_model
from olmo_train.checkpoint.merge import SHARD, choose, merge
from olmo_train.convert.folders import on_meta, write_checkpoint
from olmo_train.errors import CheckpointError, ConfigError
from olmo_train.model.config import ModelConfig
from olmo_train.storage import MANIFEST, commit_folder, hash_file, problems_of, write_file
from olmo_train.train_config import TrainConfig


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A run of six steps with checkpoints after 2, 4 and 6, on a prepared source with a tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    source, _ = prepare_source(folder)
    changes = {"model.n_layers": 1, "model.seq_len": 16, "checkpoint.interval_steps": 2}
    words = words_of(folder / "run", source, total_steps=6, **changes)
    return Path(trained(configuration.load(TrainConfig, [], words)).run_dir)


@pytest.fixture
def run_dir(trained_once, tmp_path):
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


def weights_of(folder) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_model(folder).state_dict().items()}


def rewrite(folder: Path, change) -> None:
    """Change the weights of a checkpoint, and its manifest with them."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (shard,) = folder.glob("*.safetensors")
    manifest["files"][shard.name] = write_file(shard, change(shard.read_bytes()))
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_mean_is_numpys_in_fp64_rounded_once(run_dir):
    parents = [weights_of(folder) for folder in folders.committed(run_dir).values()]
    merged = weights_of(merge(run_dir, choose(run_dir, "last=3")))
    assert merged.keys() == parents[0].keys()
    for name, weight in merged.items():
        mean = np.mean(np.stack([parent[name] for parent in parents]).astype(np.float64), axis=0)
        assert np.array_equal(weight, mean.astype(np.float32)), name
    folder = merge(run_dir, choose(run_dir, "6,2", "0.7,0.1"))
    assert folder.name.startswith("step-0000006-mean-")
    for name, weight in weights_of(folder).items():
        pair = np.stack([parents[0][name], parents[2][name]]).astype(np.float64)
        assert np.array_equal(weight, np.average(pair, axis=0, weights=[0.1, 0.7]).astype(np.float32)), name


def test_the_result_is_a_checkpoint_that_names_its_parents(run_dir, run_main):
    before = contents(run_dir / "checkpoints")
    done = run_main("checkpoints", run_dir, "--merge", "last=2")
    folder = Path(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "mean of step-0000004 x 1, step-0000006 x 1"
    assert folder.parent == run_dir / "merged" and problems_of(folder) == [] and contents(run_dir / "checkpoints") == before
    parents = [run_dir / f"checkpoints/step-000000{step}" for step in (4, 6)]
    assert json.loads((folder / MANIFEST).read_text())["parents"] == [
        {"path": str(parent), "step": step, "weight": 1.0, "manifest_sha256": hash_file(parent / MANIFEST)}
        for parent, step in zip(parents, (4, 6), strict=True)
    ]
    same = {file.name for file in parents[1].iterdir()} - {MANIFEST, "state.json", SHARD}
    assert "tokenizer.json" in same and all((folder / name).read_bytes() == (parents[1] / name).read_bytes() for name in same)
    inode = folder.stat().st_ino
    assert run_main("checkpoints", run_dir, "--merge", "4,6").stdout == done.stdout and folder.stat().st_ino == inode
    listed = run_main("checkpoints", run_dir, "--verify").stdout.splitlines()
    assert len(listed) == 4 and str(folder) in listed[-1] and listed[-1].endswith("verified")
    (folder / SHARD).write_bytes(b"damaged")
    assert run_main("checkpoints", run_dir, "--verify").returncode == 4
    assert run_main("checkpoints", run_dir, "--merge", "4,6").returncode == 0 and problems_of(folder) == []


@pytest.mark.slow
def test_the_writers_of_the_parents_do_not_change_a_bit(tiny_args, tmp_path):
    changes = {"total_steps": 3, "checkpoint.interval_steps": 1, "determinism": "world", "model.n_layers": 1}
    changes |= {"model.d_model": 32, "model.mlp_hidden": 64, "model.seq_len": 16}
    merged = []
    for size in (1, 2, 4):
        config = tiny_args(f"on-{size}", **changes)
        trained(config) if size == 1 else trained_on(size, config)
        run_dir = Path(config.run_dir)
        assert len(list((run_dir / "checkpoints/step-0000003").glob("*.safetensors"))) == size
        merged.append(merge(run_dir, choose(run_dir, "last=3")))
    assert len({(folder / SHARD).read_bytes() for folder in merged}) == 1


def test_other_verbs_and_runs_take_the_result(run_dir, run_main, tmp_path):
    folder = merge(run_dir, choose(run_dir, "last=3"))
    tokens = run_dir.parent / "held-out.npy"
    tokens.write_bytes(np.arange(200, dtype=np.uint16).tobytes())
    evaluated = run_main("evaluate", folder, "--data", f"v={tokens}", "--no-unigram", "--json")
    assert (
        evaluated.returncode == 0 and run_main("generate", folder, "--prompt", "the cat", "--max-new-tokens", 3).returncode == 0
    )
    assert run_main("convert", "export-hf", folder, tmp_path / "theirs").returncode == 0
    saved = run_dir / "config.yaml"
    for key, steps in {"init_from": [1, 2], "resume_from": [7, 8]}.items():
        words = [f"run_dir={tmp_path / key}", f"{key}={folder}", f"total_steps={steps[-1]}", "optim.warmup_steps=1"]
        done = run_main("train", saved, *words)
        assert done.returncode == 0, done.stderr
        assert [line["step"] for line in lines_of(tmp_path / key)] == steps
        merged, after = weights_of(folder), weights_of(tmp_path / key)
        assert 0 < max(np.abs(merged[name] - weight).max() for name, weight in after.items()) < 0.02


def test_on_the_stable_phase_the_mean_of_five_is_better_than_each(tmp_path):
    (tmp_path / "tokens.npy").write_bytes(markov_stream(100_000).tobytes())
    held_out = torch.from_numpy(np.array(markov_stream(64 * 64 + 1, seed=2), dtype=np.int64))
    changes = {"model.n_layers": 1, "model.d_model": 32, "model.mlp_hidden": 64, "micro_batch_size": 8, "total_steps": 200}
    changes |= {"optim.schedule": "wsd", "optim.peak_lr": 3e-2, "checkpoint.interval_steps": 5, "checkpoint.keep_last": 5}
    words = words_of(tmp_path / "run", tmp_path / "tokens.npy", **changes, **{"log.interval_steps": 50})
    cut(configuration.load(TrainConfig, [], words), 90)

    def loss(folder) -> float:
        with torch.no_grad():
            logits = load_model(folder)(held_out[:-1].view(64, 64))
        return torch.nn.functional.cross_entropy(logits.view(-1, VOCAB_SIZE), held_out[1:]).item()

    chosen = choose(tmp_path / "run", "last=5")
    assert [int(folder.name[-7:]) for folder in chosen] == [70, 75, 80, 85, 90]
    assert loss(merge(tmp_path / "run", chosen)) < min(map(loss, chosen))


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Two parents of 64 MB, in tensors of up to 4 MB: memory grows by the sum in fp64 and the tensors that wait to be written."""
    shape = ModelConfig(n_layers=4, d_model=512, n_heads=8, mlp_hidden=2048, vocab_size=512, padded_vocab_size=512, seq_len=16)
    shapes = {name: parameter.shape for name, parameter in on_meta(shape).named_parameters()}
    for step in (1, 2):
        folder = tmp_path / f"run/checkpoints/step-000000{step}"
        folder.mkdir(parents=True)
        values = {"model": configuration.to_dict(shape)}
        entries = write_checkpoint(folder, shape, values, lambda name: torch.ones(shapes[name]), {}, step)
        commit_folder(folder.rename(tmp_path / "written"), folder, entries)
    used, real = [], load.WeightReader.__call__

    def read(self, name):
        used.append(own_memory())
        return real(self, name)

    monkeypatch.setattr(load.WeightReader, "__call__", read)
    merge(tmp_path / "run", choose(tmp_path / "run", "last=2"))
    assert len(used) == 2 * len(shapes) and max(used) - used[0] < 8 * 4 * 2**20, (max(used) - used[0]) / 2**20


def own_memory() -> int:
    """Bytes of this process that are no mapped file, without what malloc keeps after free."""
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_what_cannot_be_merged_is_refused(run_dir, tiny_args, tmp_path):
    there = f"{run_dir} has 3 checkpoints: 2, 4, 6"
    for text in ("last=1", "last=4", "last=x", "last=", "4", "4,4"):
        with pytest.raises(ConfigError, match="at least 2") as caught:
            choose(run_dir, text)
        assert str(caught.value).startswith("--merge: ") and there in str(caught.value)
    with pytest.raises(ConfigError, match=r"--merge: there is no checkpoint of step 3; .* 2, 4, 6"):
        choose(run_dir, "2,3")
    with pytest.raises(ConfigError, match="newest is neither last=K nor a list of steps"):
        choose(run_dir, "newest")
    for weights in ("1", "1,1,1", "1,0", "1,-1", "1,nan", "1,inf", "1,x"):
        with pytest.raises(ConfigError, match=r"--weights: .* must be 2 finite numbers above 0.*write 1,1 for"):
            choose(run_dir, "last=2", weights)

    folder = run_dir / "checkpoints/step-0000004"
    kept = contents(folder)
    rewrite(folder, lambda content: with_weight(content, np.inf))
    with pytest.raises(CheckpointError, match=r"step-0000004: model\..* holds values that are not finite; merge other"):
        merge(run_dir, choose(run_dir, "last=3"))
    assert [path.name for path in (run_dir / "merged").iterdir()] == [".lock"]
    assert merge(run_dir, choose(run_dir, "2,6")).is_dir()
    (folder / "config.yaml").write_bytes(b"seed: 1\n")
    with pytest.raises(CheckpointError, match="step-0000004: is damaged: config.yaml"):
        merge(run_dir, choose(run_dir, "last=3"))

    for name, content in kept.items():
        (folder / name).write_bytes(content)
    shutil.rmtree(folder)
    other = trained(
        tiny_args("other", total_steps=4, **{"model.n_layers": 2, "model.seq_len": 16, "checkpoint.interval_steps": 4})
    )
    shutil.copytree(Path(other.run_dir) / "checkpoints/step-0000004", folder)
    with pytest.raises(CheckpointError, match=r"step-0000004: model.blocks.1.* is \(64, 64\), expected absent"):
        merge(run_dir, choose(run_dir, "last=3"))


def with_weight(content: bytes, value: float) -> bytes:
    """The bytes of a shard with another first value of the first weight of the model."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = 8 + length + next(entry["data_offsets"][0] for name, entry in header.items() if name.startswith("model."))
    return content[:start] + np.float32(value).tobytes() + content[start + 4 :]


def test_adapters_are_refused(run_dir, run_main, tmp_path):
    words = [f"run_dir={tmp_path / 'lora'}", f"init_from={run_dir}", "adapter.kind=lora", "adapter.rank=2", "total_steps=4"]
    assert run_main("train", run_dir / "config.yaml", *words).returncode == 0
    done = run_main("checkpoints", tmp_path / "lora", "--merge", "last=2")
    assert done.returncode == 4 and "holds adapters alone, and a mean of A and B is not that of B A" in done.stderr


def test_a_parent_that_retention_deletes_meanwhile_is_named(run_dir, monkeypatch):
    chosen, real = choose(run_dir, "last=3"), load.WeightReader.__call__

    def read(self, name):
        shutil.rmtree(run_dir / "checkpoints/step-0000002", ignore_errors=True)
        return real(self, name)

    monkeypatch.setattr(load.WeightReader, "__call__", read)
    with pytest.raises(CheckpointError, match="step-0000002: was deleted while it was merged"):
        merge(run_dir, chosen)


# ---- kills


def killed(run_dir: Path, death: Death) -> tuple[int, int]:
    """(exit code, operations) of a forked `checkpoints --merge last=3` that dies at one of its file operations."""
    counter = run_dir.with_name(f"{run_dir.name}.count")

    def merge_all() -> int:
        disk = Disk(run_dir, death)
        disk.install()
        code = main(["checkpoints", str(run_dir), "--merge", "last=3"])
        counter.write_text(str(disk.count))
        return code

    code = exit_code(fork(merge_all, os.devnull), 120)
    return code, int(counter.read_text()) if counter.exists() else 0


def sweep(run_dir, tmp_path, every, **kind):
    """Kill a merge at each death, merge again, and compare the folder with that of a merge that was left alone."""
    parents = contents(run_dir / "checkpoints")
    code, operations = killed(run_dir, Death())
    assert code == 0 and operations > 15
    ((_, whole),) = folders.merged(run_dir)
    expected = contents(whole)
    shutil.rmtree(run_dir / "merged")
    for at in range(1, operations + 1, every):
        code, _ = killed(run_dir, Death(at=at, **kind))
        assert code == -9 or kind.get("torn"), f"{at} of {operations} was not reached: {code}"
        assert all(problems_of(folder) == [] for _, folder in folders.merged(run_dir)), at  # whole, or not there
        assert main(["checkpoints", str(run_dir), "--merge", "last=3"]) == 0
        assert contents(whole) == expected and contents(run_dir / "checkpoints") == parents, at
        assert {path.name for path in (run_dir / "merged").iterdir()} == {".lock", whole.name}, at
        shutil.rmtree(run_dir / "merged")


@pytest.mark.parametrize("kind", first_quick([{}, {"power_cut": True}, {"torn": True}]))
def test_killed_at_an_operation_a_merge_is_whole_or_not_there(run_dir, tmp_path, kind):
    sweep(run_dir, tmp_path, 5, **kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"power_cut": True}, {"torn": True}])
def test_killed_at_every_operation_of_a_merge(run_dir, tmp_path, kind):
    sweep(run_dir, tmp_path, 1, **kind)

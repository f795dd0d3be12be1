"""What is saved is what is loaded, on any number of processes; what is damaged is named and passed over."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import words_of
from data_sources import prepare_source
from runs import events_of, trained

from olmo_train import config as configuration
from olmo_train.__main__ import main
from olmo_train.checkpoint import folders, load
from olmo_train.checkpoint import save as checkpoint_save
from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.checkpoint.load import load_model
from olmo_train.errors import CheckpointError, SaveError, Stopped
from olmo_train.run.run import Run
from olmo_train.storage import MANIFEST, hash_file, lock_run_dir, problems_of
from olmo_train.train import train
from olmo_train.train_config import TrainConfig


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, stream):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tokens.npy").write_bytes(stream)
    words = words_of(folder / "run", folder / "tokens.npy", total_steps=6, **{"checkpoint.interval_steps": 2})
    return Path(trained(configuration.load(TrainConfig, [], words)).run_dir)


@pytest.fixture
def finished(trained_once, tmp_path):
    """The run_dir of a run of six steps with checkpoints after 2, 4 and 6, which a test may damage."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


def steps_of(run_dir):
    return list(folders.committed(run_dir))


def test_a_checkpoint_is_safetensors_and_json_with_hashes_of_what_was_written(finished):
    for folder in folders.committed(finished).values():
        names = {path.name for path in folder.iterdir()}
        assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".yaml"}
        files = json.loads((folder / MANIFEST).read_text())["files"]
        assert set(files) == names - {MANIFEST}
        assert all(entry["sha256"] == hash_file(folder / name) for name, entry in files.items())


def test_the_saved_model_is_the_trained_one(tiny_args):
    run = train(tiny_args("run", total_steps=3))
    trained_weights = None

    real = Run.save

    def save(self, step, model, optimizer):
        nonlocal trained_weights
        trained_weights = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
        real(self, step, model, optimizer)

    Run.save = save
    try:
        list(run)
    finally:
        Run.save = real
    loaded = dict(load_model(tiny_args("run").run_dir).named_parameters())
    assert loaded.keys() == trained_weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in trained_weights.items())


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(finished, caplog):
    shard = next((finished / "checkpoints/step-0000006").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert folders.newest(finished).name == "step-0000004"
    assert "step-0000006" in caplog.text and shard.name in caplog.text
    assert shard.read_bytes() == content  # left alone
    with pytest.raises(CheckpointError, match="step-0000006"):
        folders.newest(finished, strict=True)


def test_a_foreign_file_and_linked_shards_load_the_same_weights(finished, tmp_path, caplog):
    folder = finished / "checkpoints/step-0000006"
    before = load.load_model(folder).state_dict()
    (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # never opened
    for file in list(folder.glob("*.safetensors")):
        shutil.move(file, tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    assert folders.newest(finished) == folder
    (record,) = [record for record in caplog.records if record.name == "olmo_train.storage"]
    assert "ignored: model.pt" in record.getMessage() and "links" in record.getMessage()
    after = load.load_model(folder).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_none_that_verifies_is_an_error_with_exit_code_4_and_no_fresh_start(finished, tiny_words, run_main):
    for folder in folders.committed(finished).values():
        (folder / "state.json").write_text("{}")
    lines = (finished / "metrics.jsonl").read_bytes()
    done = run_main("train", *tiny_words("run", total_steps=8, **{"checkpoint.interval_steps": 2}))
    assert done.returncode == 4 and done.stderr.splitlines()[-1].startswith("error: ") and "none of the 3" in done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == lines


def test_a_checkpoint_of_another_shape_is_refused_by_the_tensors_name(finished, tiny_args):
    for wrong in ({"model.n_layers": 1}, {"model.n_layers": 3}, {"model.mlp_hidden": 160}):
        config = tiny_args("other", total_steps=8, resume_from=finished, **wrong)
        with pytest.raises(CheckpointError, match=r"blocks\.\d.* is .*, expected .* for this model"):
            trained(config)


def test_retention_counts_committed_checkpoints_and_spares_permanent_ones(tiny_args):
    changes = {"checkpoint.interval_steps": 1, "checkpoint.keep_last": 2, "checkpoint.save_steps": "[0,1,2,4,8]"}
    changes |= {"checkpoint.permanent_interval_steps": 5}
    config = tiny_args("run", **changes)
    trained(config)
    assert steps_of(Path(config.run_dir)) == [0, 1, 2, 4, 5, 8, 10, 11, 12]
    trained(tiny_args("run", total_steps=14, **changes))
    assert steps_of(Path(config.run_dir)) == [0, 1, 2, 4, 5, 8, 10, 13, 14]


def test_damaged_checkpoints_do_not_push_out_the_good_one_that_is_written_after_them(tiny_args):
    config = tiny_args("run", total_steps=6, **{"checkpoint.interval_steps": 3})
    trained(config)
    folder = Path(config.run_dir) / "checkpoints"
    (folder / "step-0000006/state.json").write_text("{}")
    shutil.copytree(folder / "step-0000006", folder / "step-0000005")
    trained(tiny_args("run", total_steps=4, **{"checkpoint.interval_steps": 3, "checkpoint.keep_last": 1}))
    assert folders.newest(Path(config.run_dir)).name == "step-0000004"
    assert steps_of(Path(config.run_dir)) == [4, 5, 6]  # the damaged ones are left alone


def test_a_cut_checkpoint_neither_counts_as_kept_nor_is_deleted(tiny_args):
    changes = {"checkpoint.interval_steps": 2, "checkpoint.keep_last": 2, "checkpoint.async_save": False}
    config = tiny_args("run", total_steps=8, **changes)
    for stats in train(config):
        if stats.step == 7:  # step 6 is saved
            os.truncate(Path(config.run_dir) / "checkpoints/step-0000006/state.json", 3)
    assert steps_of(Path(config.run_dir)) == [4, 6, 8]
    assert folders.newest(Path(config.run_dir)).name == "step-0000008"


def test_a_leftover_of_a_dead_save_neither_blocks_nor_stays(tiny_args):
    config = tiny_args("run", total_steps=2)
    leftover = Path(config.run_dir) / "checkpoints/.step-0000002.tmp"
    leftover.mkdir(parents=True)
    (leftover / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    trained(config)
    assert [path.name for path in leftover.parent.iterdir()] == ["step-0000002"]


class Full(Exception):
    pass


@pytest.fixture
def disk_fills(monkeypatch):
    """disk_fills(step, ...): from then on nothing can be written into the checkpoints of these steps."""
    import io

    real = io.open

    def at(*steps):
        names = [f"step-{step:07d}.tmp" for step in steps]

        def opened(file, mode="r", *args, **kwargs):
            if any(name in str(file) for name in names) and set(mode) & set("wax+"):
                raise OSError(28, "No space left on device", str(file))
            return real(file, mode, *args, **kwargs)

        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr("builtins.open", opened)

    return at


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk_ends_the_run_with_path_and_need_and_older_checkpoints_stay(tiny_args, disk_fills, async_save):
    config = tiny_args("run", **{"checkpoint.async_save": async_save})
    disk_fills(10)
    with pytest.raises(SaveError, match=r"step-0000010.*No space left.*needs .* GB") as told:
        trained(config)
    assert told.value.exit_code == 1
    assert folders.newest(Path(config.run_dir)).name == "step-0000005"


def test_where_a_save_is_not_required_training_goes_on(tiny_args, disk_fills, caplog, read_metrics):
    config = tiny_args("run", **{"checkpoint.required": False})
    disk_fills(10)
    trained(config)
    assert steps_of(Path(config.run_dir)) == [5, 12] and len(read_metrics(config.run_dir)) == 12
    assert "training continues" in caplog.text


def kinds_of(run_dir):
    return [(event["event"], event["step"]) for event in events_of(run_dir)]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_run_is_never_called_saved_or_finished_without_its_checkpoint(tiny_args, disk_fills, monkeypatch, async_save):
    """Where a save is not required, too: training goes on without one, but a scheduler must not be misled."""
    config = tiny_args("run", **{"checkpoint.required": False, "checkpoint.async_save": async_save})
    disk_fills(5, 7, 12)
    with pytest.raises(SaveError, match=r"step-0000007.*No space left"):
        for stats in train(config):
            if stats.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SaveError, match=r"step-0000012.*No space left"):
        trained(config)
    assert kinds_of(config.run_dir) == [("start", 0), ("signal", 7), ("start", 0), ("save", 10)]
    monkeypatch.undo()  # there is room again
    trained(config)
    assert kinds_of(config.run_dir)[4:] == [("resume", 10), ("save", 12), ("finish", 12)]


def test_a_stop_tries_a_failed_save_of_the_same_step_again(tiny_args, disk_fills, monkeypatch):
    config = tiny_args("run", **{"checkpoint.required": False, "checkpoint.async_save": False})
    disk_fills(5)
    real = Run.save

    def save(*about):
        real(*about)
        monkeypatch.undo()  # there is room again
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(Stopped, match="saved after step 5 of 12"):
        trained(config)
    assert steps_of(Path(config.run_dir)) == [5]


def test_a_kill_while_a_checkpoint_is_replaced_does_not_lose_it(finished, tiny_args, monkeypatch):
    folder = folders.newest(finished)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir()
    saver = SimpleNamespace(run_dir=finished, config=CheckpointConfig(), files={})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_save, "commit_folder", lambda *about: signal.raise_signal(signal.SIGINT))
        checkpoint_save.Checkpointer._commit(saver, temporary, folder, {"step": 6}, {})
    assert folders.newest(finished).name == "step-0000004"  # what `evaluate` does beside a live run: it moves nothing
    trained(tiny_args("run", total_steps=6))
    assert folders.newest(finished).name == "step-0000006" and kinds_of(finished)[-1] == ("finish", 6)
    assert not list(folder.parent.glob(".*.old"))


def test_a_pinned_snapshot_is_one_registered_allocation_until_it_is_closed(monkeypatch):
    """torch's pinned allocator would round it up to a power of two; CUDA itself is a stand-in here."""
    registered = {}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: registered.update({address: size}), cudaHostUnregister=registered.pop
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    tensors = {"a": torch.ones(3), "b": torch.ones(5, 7), "c": torch.ones(0, 2), "d": torch.ones(2)}
    buffers = checkpoint_save._host_buffers(tensors, pinned=True)
    start = buffers["a"].data_ptr()
    assert registered == {start: 64 + 192 + 64}
    assert [buffers[name].data_ptr() - start for name in "abd"] == [0, 64, 256]
    assert all(buffers[name].copy_(tensor).equal(tensor) and buffers[name].is_contiguous() for name, tensor in tensors.items())
    thread, world = SimpleNamespace(shutdown=lambda wait: None), SimpleNamespace(device=torch.device("cuda"))
    checkpoint_save.Checkpointer.close(SimpleNamespace(_thread=thread, _host=buffers, world=world))
    assert registered == {}


def test_a_non_finite_state_is_never_committed(tiny_args):
    from olmo_train.errors import NonFiniteError

    config = tiny_args("run")
    run = train(config)

    real = Run.save

    def poisoned(self, step, model, optimizer):
        with torch.no_grad():
            next(model.parameters()).to_local()[0, 0] = float("nan")
        real(self, step, model, optimizer)

    Run.save = poisoned
    try:
        with pytest.raises(NonFiniteError, match="not committed"):
            list(run)
    finally:
        Run.save = real
    assert steps_of(Path(config.run_dir)) == []


def test_an_unknown_format_is_not_taken_for_a_whole_checkpoint(finished):
    manifest = finished / "checkpoints/step-0000006" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    assert problems_of(manifest.parent) == ["MANIFEST.json has format 2, and 1 is known"]
    assert folders.newest(finished).name == "step-0000004"


def test_the_shards_are_safetensors_files_that_the_library_reads(finished):
    from safetensors.torch import load_file

    (shard,) = (finished / "checkpoints/step-0000006").glob("*.safetensors")
    read = {name: tensor for name, tensor in load_file(shard).items() if name.startswith("model.")}
    model = {f"model.{name}": parameter for name, parameter in load_model(finished).named_parameters()}
    assert model.keys() == read.keys() and all(torch.equal(model[name], tensor) for name, tensor in read.items())
    assert len(load_file(shard)) == 3 * len(read)  # and both moments of each


def test_a_prepared_folder_without_its_tokenizer_is_named(tmp_path, tiny_words, run_main):
    source, _ = prepare_source(tmp_path)
    (source / "tokenizer.json").unlink()
    words = tiny_words("run", **{"data.sources.a.path": source, "model.vocab_size": 300, "model.padded_vocab_size": 300})
    done = run_main("train", *words)
    assert done.returncode == 3 and done.stderr.splitlines()[-1].startswith(f"error: {source / 'tokenizer.json'}: ")
    assert "Traceback" not in done.stderr


def test_save_steps_and_intervals_are_due():
    config = CheckpointConfig(interval_steps=10, save_steps=(1, 2), permanent_interval_steps=25)
    assert [step for step in range(31) if config.is_due(step) and step] == [1, 2, 10, 20, 25, 30]


def test_the_verb_lists_verifies_and_prunes(finished, run_main):
    listed = run_main("checkpoints", finished, "--verify")
    assert listed.returncode == 0 and listed.stdout.count("verified") == 3
    (finished / "config.yaml").write_text((finished / "config.yaml").read_text().replace("keep_last: 3", "keep_last: 1"))
    dry = run_main("checkpoints", finished, "--prune", "--dry-run")
    assert dry.stdout.count("would delete") == 2 and steps_of(finished) == [2, 4, 6]
    run_main("checkpoints", finished, "--prune")
    assert steps_of(finished) == [6]
    (finished / "checkpoints/step-0000006/state.json").write_text("{}")
    assert run_main("checkpoints", finished, "--verify").returncode == 4


def test_the_stall_and_the_bandwidth_of_saves_are_metrics(finished, read_metrics):
    lines = read_metrics(finished)
    assert any("throughput/checkpoint_stall_seconds" in line for line in lines)
    assert any(line.get("throughput/checkpoint_bytes_per_second", 0) > 0 for line in lines)


def test_a_dry_run_of_prune_needs_no_lock(tiny_args, capsys):
    config = tiny_args("run")
    for step in (1, 2):
        (Path(config.run_dir) / f"checkpoints/step-000000{step}").mkdir(parents=True)
    (Path(config.run_dir) / "config.yaml").write_text(configuration.dump(config))
    with lock_run_dir(Path(config.run_dir)):
        assert main(["checkpoints", config.run_dir, "--prune", "--dry-run"]) == 0
        assert main(["checkpoints", config.run_dir, "--prune"]) == 2

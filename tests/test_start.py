"""At the start of a run each rank does its share: it hashes files, checks ids and draws first values. What one rank finds, all
ranks report, and every number of ranks starts from the same checkpoint and the same bits."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from runs import first_quick, lines_of, trained

from olmo_train import storage
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.verify import with_all_ranks
from olmo_train.data import shards as data_shards
from olmo_train.errors import CheckpointError, DataError
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import shard
from olmo_train.run import open as opening

FILES = 4


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run_dir with the checkpoints of steps 1 and 2, of four equal files each."""
    for step in (1, 2):
        final = folders.folder_of(tmp_path, step)
        temporary = storage.temporary_folder(final)
        names = [f"shard-{i}.safetensors" for i in range(FILES)]
        entries = {name: storage.write_file(temporary / name, bytes([step, i]) * 500) for i, name in enumerate(names)}
        storage.commit_folder(temporary, final, entries)
    return tmp_path


def damage(run_dir: Path, step: int, file: int) -> None:
    path = folders.folder_of(run_dir, step) / f"shard-{file}.safetensors"
    path.write_bytes(b"\0" + path.read_bytes()[1:])


def found_on(size: int, run_dir: Path, monkeypatch, strict: bool = False) -> list[tuple]:
    """(the checkpoint that each rank takes or its error and exit code, the bytes that it hashed, its warnings)."""
    hashed, hash_file = [], storage.hash_file
    monkeypatch.setattr(storage, "hash_file", lambda path: hashed.append(path.stat().st_size) or hash_file(path))
    warnings = []
    monkeypatch.setattr(folders.log, "warning", lambda text, *values: warnings.append(text % values))

    def find(world):
        try:
            taken = with_all_ranks(world, lambda check: folders.newest(run_dir, strict, check)).name
        except CheckpointError as problem:
            taken = [str(problem), problem.exit_code]
        return taken, sum(hashed), warnings

    return on_ranks(size, find)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_hashes_its_share_of_a_checkpoint(size, run_dir, monkeypatch):
    assert found_on(size, run_dir, monkeypatch) == [["step-0000002", FILES * 1000 // size, []]] * size


@pytest.mark.parametrize("file", first_quick(range(FILES), 2))
def test_a_file_that_one_rank_finds_damaged_sends_all_ranks_to_the_checkpoint_before(file, run_dir, monkeypatch):
    damage(run_dir, 2, file)
    ranks = found_on(2, run_dir, monkeypatch)
    assert [taken for taken, _, _ in ranks] == ["step-0000001"] * 2
    (warning,) = ranks[0][2]
    assert f"shard-{file}.safetensors does not have the hash of what was written" in warning and ranks[1][2] == []
    assert ("(on rank 1)" in warning) == (file % 2 == 1)
    problem = found_on(2, run_dir, monkeypatch, strict=True)[1][0]
    assert f"shard-{file}.safetensors" in problem[0] and problem[1] == 4


def test_none_that_verifies_is_the_same_error_on_all_ranks(run_dir, monkeypatch):
    damage(run_dir, 1, 3)
    damage(run_dir, 2, 2)
    ranks = found_on(4, run_dir, monkeypatch)
    assert {tuple(problem) for problem, _, _ in ranks} == {(ranks[0][0][0], 4)}
    assert "none of the 2 checkpoints verifies" in ranks[0][0][0]


def test_an_error_of_the_choice_itself_is_raised_on_all_ranks(tmp_path):
    def choose(world):
        with pytest.raises(CheckpointError, match="is neither a checkpoint folder nor a run_dir"):
            with_all_ranks(world, lambda check: folders.resolve(tmp_path, check))

    on_ranks(2, choose)


# ---- ids of the data


def test_each_rank_checks_its_share_of_the_shards_and_a_bad_id_is_an_error_on_all(tiny_args, tmp_path, monkeypatch):
    files = [tmp_path / f"part-{i}.npy" for i in range(4)]
    for file in files:
        (np.arange(40_000) % 512).astype(np.uint16).tofile(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tiny_args("run", **{"data.sources.a.path": f"[{','.join(map(str, files))}]"})
    checked = []
    monkeypatch.setattr(opening, "check_ids", lambda s, v, shards: checked.extend(shards) or data_shards.check_ids(s, v, shards))

    def opened(world) -> list:
        try:
            opening._open_data(config, world)
        except DataError as problem:
            return [sorted(checked), str(problem), problem.exit_code]
        return [sorted(checked)]

    for size in (1, 2, 4):
        ranks = on_ranks(size, opened)
        assert sorted(shard for (mine,) in ranks for shard in mine) == [0, 1, 2, 3]
        assert {len(mine) for (mine,) in ranks} == {4 // size}
    ids = np.fromfile(files[3], np.uint16)
    ids[7_000] = 600  # between the blocks that are looked at when a source is opened
    ids.tofile(files[3])
    (_, first, code), (_, second, other_code) = on_ranks(2, opened)
    assert first == second and code == other_code == 3
    assert first.startswith(f"{files[3]}: on rank 1: token 7000 has id 600")


# ---- first values


def first_values(config, size: int, **options) -> list[tuple[str, int]]:
    """(hash of all full first values, elements drawn) of each rank."""

    def draw(world) -> tuple[str, int]:
        drawn, initial_value = [], shard.initial_value
        shard.initial_value = lambda name, shape, *about: drawn.append(shape.numel()) or initial_value(name, shape, *about)
        with torch.device("meta"):
            model = Transformer(config.model)
        shard.shard(model, config.parallel, world)
        shard.init_weights(model, seed=5)
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.full_tensor().detach().numpy().tobytes())
        return digest.hexdigest(), sum(drawn)

    return on_ranks(size, draw, **options)


def test_each_rank_draws_its_share_of_the_first_values_and_their_bits_do_not_change(tiny_args):
    # 33 and 7 cannot be halved, so shards differ in size, and some are empty.
    config = tiny_args(**{"model.mlp_hidden": 33, "model.d_model": 24, "model.vocab_size": 7, "model.padded_vocab_size": 7,
                          "model.norm": "rms_norm", "model.n_layers": 4})  # fmt: skip
    ((bits, total),) = first_values(config, 1)
    plain = hashlib.sha256()
    with torch.device("meta"):
        model = Transformer(config.model)
    for name, parameter in model.named_parameters():
        plain.update(shard.initial_value(name, parameter.shape, config.model, 5).numpy().tobytes())
    assert bits == plain.hexdigest() and total == sum(p.numel() for p in model.parameters())
    for size, options in ((2, {}), (4, {}), (4, {"replicas": 2})):
        ranks = first_values(config, size, **options)
        assert {found for found, _ in ranks} == {bits}
        assert sum(drawn for _, drawn in ranks) == total, "each is drawn once"
        assert max(drawn for _, drawn in ranks) < 1.1 * total / size


def test_a_run_is_patient_while_checkpoints_are_verified(tiny_args, tmp_path, monkeypatch):
    """Verifying takes minutes on a slow disk: the watchdog runs by then, and says what the run does."""
    config = trained(tiny_args("run", total_steps=2))
    seen = []
    patient = opening.Watchdog.patient
    monkeypatch.setattr(opening.Watchdog, "patient", lambda self, doing: seen.append(doing) or patient(self, doing))
    trained(tiny_args("run", total_steps=3))
    assert seen[0] == "verifies checkpoints" and len(lines_of(config.run_dir)) == 3

"""Sources, mixed: the batch of a step is the same whoever asks, and every token is a target once an epoch."""

import hashlib

import numpy as np
import pytest
from runs import trained

from olmo_train.data.config import DataConfig, SourceConfig, StageConfig
from olmo_train.data.mixture import Mixture
from olmo_train.errors import ConfigError, DataError

T = 8


def write(folder, name, ids):
    file = folder / name
    np.asarray(ids, dtype="<u2").tofile(file)
    return str(file)


def mixture(sources, order="permute", batch=4, seed=1, weights=None, **options):
    """A mixture of {name: path}, with equal weights unless {name: weight} are given."""
    configs = {name: SourceConfig(path, (weights or {}).get(name, 1.0)) for name, path in sources.items()}
    return Mixture(DataConfig(configs, order, **options), seed, batch, T, vocab_size=60_000)


def test_an_instance_is_one_token_longer_than_its_stride(tmp_path):
    mixed = mixture({"a": write(tmp_path, "a.npy", range(100))})
    assert mixed.sizes == [12]  # 99 targets
    assert mixed.span(0, 3) == (24, 33)
    batch = mixed.global_batch(1)
    for row, instance in zip(mixed.read(batch), batch.instance, strict=True):
        assert row.tolist() == list(range(instance * T, instance * T + T + 1))


def test_every_token_but_the_first_is_a_target_once_an_epoch(tmp_path):
    mixed = mixture({"a": write(tmp_path, "a.npy", range(4 * T * 5 + 1))})
    targets = np.concatenate([mixed.read(mixed.global_batch(step))[:, 1:].ravel() for step in range(1, 6)])
    assert np.array_equal(np.sort(targets), np.arange(1, 4 * T * 5 + 1))


def test_an_instance_reads_across_the_files_of_a_source(tmp_path):
    files = (write(tmp_path, "a.npy", range(13)), write(tmp_path, "b.npy", range(13, 30)))
    mixed = mixture({"a": files}, batch=3)
    assert mixed.sizes == [3]
    rows = mixed.read(mixed.global_batch(1))
    assert sorted(rows[:, 0].tolist()) == [0, 8, 16]
    assert all(np.array_equal(np.diff(row), np.ones(T)) for row in rows)


def test_the_order_of_olmo_cuts_each_file_by_itself(tmp_path):
    files = (write(tmp_path, "a.npy", range(21)), write(tmp_path, "b.npy", range(100, 117)))
    mixed = mixture({"a": files}, order="olmo", batch=4)
    assert mixed.sizes == [4]  # 2 of 21 tokens, 2 of 17
    rows = mixed.read(mixed.global_batch(1))
    assert rows.shape == (4, T)
    assert sorted(rows[:, 0].tolist()) == [0, 8, 100, 108]


def test_sources_share_the_batch_by_their_weights(tmp_path):
    sources = {"a": write(tmp_path, "a.npy", range(2000)), "b": write(tmp_path, "b.npy", range(1000))}
    mixed = mixture(sources, batch=100, weights={"a": 3.0, "b": 1.0})
    counts = sum(np.bincount(mixed.global_batch(step).source, minlength=2) for step in range(1, 101))
    assert counts.tolist() == [7500, 2500]


def test_a_stage_changes_the_mix_from_its_step_on(tmp_path):
    sources = {"a": write(tmp_path, "a.npy", range(2000)), "b": write(tmp_path, "b.npy", range(1000))}
    plain, staged = mixture(sources), mixture(sources, stages=(StageConfig(5, {"b": 1.0}),))
    for step in (1, 4):
        assert plain.sample_hash(plain.global_batch(step)) == staged.sample_hash(staged.global_batch(step))
    assert set(staged.global_batch(5).source.tolist()) == {1}


def test_the_sample_hash_is_that_of_the_sorted_pairs(tmp_path):
    sources = {"b": write(tmp_path, "b.npy", range(2000)), "a": write(tmp_path, "a.npy", range(1000))}
    mixed = mixture(sources, batch=6)
    batch = mixed.global_batch(3)
    pairs = sorted((["b", "a"][s], int(i)) for s, i in zip(batch.source, batch.instance, strict=True))
    text = "".join(f"{source}\t{instance}\n" for source, instance in pairs)
    assert mixed.sample_hash(batch) == hashlib.sha256(text.encode()).hexdigest()
    assert mixed.sample_hash(batch[np.arange(5, -1, -1)]) == mixed.sample_hash(batch)
    assert mixed.sample_hash(batch[:5]) != mixed.sample_hash(batch)


def test_the_order_has_the_runs_seed_unless_the_data_have_one(tmp_path):
    file = write(tmp_path, "a.npy", range(2000))

    def first(run_seed, data_seed):
        config = DataConfig({"a": SourceConfig(file)}, seed=data_seed)
        return Mixture(config, run_seed, 4, T, 60_000).global_batch(1).instance.tolist()

    assert first(1, None) == first(2, 1) != first(2, None)
    assert first(2, 0) == first(3, 0) != first(2, None)


def test_too_little_data_is_refused_with_what_is_needed(tmp_path):
    with pytest.raises(DataError, match=r"data.sources.a: 0 instances of 8 tokens in .*a.npy; the run needs at least 1"):
        mixture({"a": write(tmp_path, "a.npy", range(8))})
    with pytest.raises(DataError, match=r"data.sources.a: 3 instances of 8 tokens in .*; the run needs at least 4"):
        mixture({"a": write(tmp_path, "a.npy", range(24))}, order="olmo")


def test_an_id_beyond_the_vocabulary_is_refused_with_file_and_offset(tmp_path):
    """In a place that no sample of the file has looked at."""
    ids = np.zeros(200_000, dtype=np.uint16)
    ids[50_001] = 999
    config = DataConfig({"a": SourceConfig((write(tmp_path, "a.npy", ids[:100]), write(tmp_path, "b.npy", ids)))})
    mixed = Mixture(config, 1, 25_000, T, vocab_size=500)
    with pytest.raises(DataError, match=r"b.npy: token 50001 has id 999, but the last id of the vocabulary is 499"):
        mixed.read(mixed.global_batch(1))


def test_a_document_mask_needs_an_eos(tmp_path):
    file = write(tmp_path, "a.npy", range(100))
    with pytest.raises(ConfigError, match="data.document_mask: needs one EOS id"):
        mixture({"a": file}, document_mask=True)
    assert mixture({"a": file}, document_mask=True, eos_id=7).eos_id == 7


def test_the_epochs_of_each_source_are_logged_while_it_trains(tiny_args, read_metrics):
    """12 steps of 8 instances from two sources of 624 each, three quarters of them from one."""

    path = tiny_args().data.sources["a"].path
    config = trained(tiny_args("run", **{"data.sources.b.path": path, "data.sources.a.weight": 3.0}))
    lines = read_metrics(config.run_dir)
    for line in lines:
        read = line["step"] * 8 / 624
        assert line["train/source/a/epoch"] + line["train/source/b/epoch"] == pytest.approx(read)
    assert lines[-1]["train/source/a/epoch"] > 2 * lines[-1]["train/source/b/epoch"]

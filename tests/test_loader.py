"""Batches as tensors: the ranks' parts make up the global batch, labels are the next tokens, validation scores each once."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from olmo_train.data import loader as loading
from olmo_train.data.config import DataConfig, SourceConfig
from olmo_train.data.loader import IGNORE, Loader, document_numbers, read_batch, split_labels, validation_batches
from olmo_train.data.mixture import Mixture
from olmo_train.data.shards import open_source
from olmo_train.errors import DataError

T, BATCH, CPU = 8, 12, torch.device("cpu")


@pytest.fixture
def mixture(tmp_path):
    """Two sources of ids that are each other's neighbours nowhere; every third token of b is no scored label."""

    def build(order="permute", masked=False, **options):
        for name, start in (("a", 0), ("b", 30_000)):
            np.arange(start, start + 1000, dtype="<u2").tofile(tmp_path / f"{name}.npy")
        sources = {name: SourceConfig(str(tmp_path / f"{name}.npy")) for name in "ab"}
        mixed = Mixture(DataConfig(sources, order, **options), 1, BATCH, T, vocab_size=60_000)
        if masked:
            mixed.sources[1].has_label_mask = True
            mixed.sources[1]._labels = [(np.arange(1000) % 3 != 0).astype(np.uint8)]
        return mixed

    return build


def rows(batch):
    return list(zip(batch.input_ids.tolist(), batch.labels.tolist(), batch.sources.tolist(), strict=True))


@pytest.mark.parametrize("world_size", [n for n in range(1, BATCH + 1) if BATCH % n == 0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_ranks_parts_are_the_global_batch(mixture, world_size, masked):
    mixed = mixture(masked=masked)
    whole = read_batch(mixed, 3, 0, 1)
    parts = [read_batch(mixed, 3, rank, world_size) for rank in range(world_size)]
    assert list(itertools.chain(*map(rows, parts))) == rows(whole)
    assert {len(part.input_ids) for part in parts} == {BATCH // world_size}
    assert {part.sample_hash for part in parts} == {whole.sample_hash}


@pytest.mark.parametrize("rows_each", [1, 2, 3, 4, 6, 12])
def test_micro_batches_are_the_batch(mixture, rows_each):
    batch = read_batch(mixture(masked=True, document_mask=True, eos_id=5), 1, 0, 1)
    micros = list(batch.micro_batches(rows_each))
    assert {len(micro.input_ids) for micro in micros} == {rows_each}
    assert list(itertools.chain(*map(rows, micros))) == rows(batch)
    assert torch.equal(torch.cat([micro.documents for micro in micros]), batch.documents)


def test_each_label_is_the_next_token(mixture):
    batch = read_batch(mixture(), 1, 0, 1)
    assert batch.input_ids.shape == batch.labels.shape == (BATCH, T)
    assert torch.equal(batch.labels, batch.input_ids + 1)


def test_in_olmos_order_the_last_token_has_no_label(mixture):
    batch = read_batch(mixture(order="olmo"), 1, 0, 1)
    assert batch.input_ids.shape == batch.labels.shape == (BATCH, T)
    assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
    assert (batch.labels[:, -1] == IGNORE).all()


@pytest.mark.parametrize("order", ["permute", "olmo"])
def test_a_mask_hides_the_token_it_stands_at_and_no_other(mixture, order):
    batch = read_batch(mixture(order, masked=True), 1, 0, 1)
    plain = read_batch(mixture(order), 1, 0, 1)
    assert torch.equal(batch.input_ids, plain.input_ids)
    hidden = (plain.labels >= 30_000) & ((plain.labels - 30_000) % 3 == 0)
    assert torch.equal(batch.labels, plain.labels.masked_fill(hidden, IGNORE))
    assert hidden.any() and not hidden.all()


def test_split_labels_by_hand():
    tokens, mask = torch.tensor([[5, 6, 7, 8]]), np.array([[0, 1, 0, 1]], dtype=np.uint8)
    assert [t.tolist() for t in split_labels(tokens, None, False)] == [[[5, 6, 7]], [[6, 7, 8]]]
    assert [t.tolist() for t in split_labels(tokens, mask, False)] == [[[5, 6, 7]], [[6, IGNORE, 8]]]
    assert [t.tolist() for t in split_labels(tokens, None, True)] == [[[5, 6, 7, 8]], [[6, 7, 8, IGNORE]]]
    assert [t.tolist() for t in split_labels(tokens, mask, True)] == [[[5, 6, 7, 8]], [[6, IGNORE, 8, IGNORE]]]


def test_an_eos_belongs_to_the_document_that_it_ends():
    assert document_numbers(torch.tensor([[1, 9, 2, 3, 9, 9, 4]]), 9).tolist() == [[0, 0, 1, 1, 1, 2, 3]]


# ---- the thread that reads ahead


def closing(mixture, first_step=1, rank=0, world_size=1):
    return Loader(mixture, rank, world_size, CPU, first_step)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_a_loader_starts_at_any_step_and_yields_steps_in_order(mixture):
    mixed = mixture()
    loader = closing(mixed, first_step=7, rank=1, world_size=3)
    for step in range(7, 20):
        assert rows(loader.get()) == rows(read_batch(mixed, step, 1, 3))
    loader.close()


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_a_closed_loader_leaves_no_thread(mixture, taken):
    loader = closing(mixture())
    for _ in range(taken):
        loader.get()
    loader.close()
    assert loader_threads() == []


def test_what_goes_wrong_while_reading_is_raised_where_the_batch_is_asked_for(mixture, monkeypatch):
    mixed = mixture()
    real = mixed.read

    def read(batch):
        if batch.epoch.max() > 0:
            raise DataError("a.npy", "is gone")
        return real(batch)

    monkeypatch.setattr(mixed, "read", read)
    loader = closing(mixed)
    with pytest.raises(DataError, match="a.npy: is gone"):
        for _ in range(100):
            loader.get()
    loader.close()
    assert loader_threads() == []


def test_waiting_for_a_batch_ends_when_give_up_is_true(mixture, monkeypatch):
    monkeypatch.setattr(loading, "PATIENCE", 0.02)
    mixed, go_on = mixture(), threading.Event()
    real = mixed.read
    monkeypatch.setattr(mixed, "read", lambda batch: (go_on.wait(10), real(batch))[1])
    loader, asked = closing(mixed), []
    assert loader.get(give_up=lambda: asked.append(1) or len(asked) > 2) is None
    go_on.set()
    assert loader.get() is not None
    loader.close()


def test_batches_are_read_ahead_but_not_without_end(mixture, monkeypatch):
    mixed, steps = mixture(), []
    real = mixed.global_batch
    monkeypatch.setattr(mixed, "global_batch", lambda step: steps.append(step) or real(step))
    loader = closing(mixed)
    deadline = time.monotonic() + 10
    while len(steps) < loading.AHEAD + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert steps == list(range(1, loading.AHEAD + 2))
    loader.close()


# ---- validation


@pytest.mark.parametrize("n_tokens", [2, 9, 10, 17, 100, 129])
@pytest.mark.parametrize("world_size, rows_each", [(1, 1), (1, 4), (2, 2), (3, 1), (4, 8)])
def test_validation_scores_every_token_but_the_first_once(tmp_path, n_tokens, world_size, rows_each):
    np.arange(n_tokens, dtype="<u2").tofile(tmp_path / "v.npy")
    source = open_source("v", SourceConfig(str(tmp_path / "v.npy")), 1000)
    scored, shapes = [], set()
    batches = [list(validation_batches(source, T, rows_each, rank, world_size)) for rank in range(world_size)]
    assert len({len(part) for part in batches}) == 1, "sharded models need the same number on every rank"
    for batch in itertools.chain(*batches):
        shapes.add(tuple(batch.input_ids.shape))
        keep = batch.labels != IGNORE
        assert torch.equal(batch.labels[keep], batch.input_ids[keep] + 1)
        scored += batch.labels[keep].tolist()
    assert sorted(scored) == list(range(1, n_tokens))
    assert shapes == {(rows_each, T)}


def test_validation_leaves_out_what_a_mask_hides(tmp_path):
    np.arange(50, dtype="<u2").tofile(tmp_path / "v.npy")
    source = open_source("v", SourceConfig(str(tmp_path / "v.npy")), 1000)
    source.has_label_mask, source._labels = True, [(np.arange(50) % 2).astype(np.uint8)]
    labels = torch.cat([batch.labels.flatten() for batch in validation_batches(source, T, 2, 0, 1)])
    assert sorted(labels[labels != IGNORE].tolist()) == list(range(1, 50, 2))

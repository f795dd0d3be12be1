"""A checkpoint saved on any number of ranks is the same state on any other, exactly: weights, moments, count of updates."""

import dataclasses
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from olmo_train import config as configuration
from olmo_train.checkpoint import folders
from olmo_train.checkpoint import load as checkpoint_load
from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.model.transformer import Transformer
from olmo_train.optim import build as optim
from olmo_train.parallel import gradients, shard
from olmo_train.parallel.world import join_world
from olmo_train.train_config import TrainConfig

# 33 and 7 cannot be halved, so that ranks have shards of different sizes; one norm has fewer elements than some have ranks.
WORDS = ["run_dir=unused", "data.sources.a.path=unused", "model.d_model=6", "model.n_layers=2", "model.n_heads=1",
         "model.mlp_hidden=7", "model.vocab_size=33", "model.padded_vocab_size=33", "model.seq_len=8",
         "model.norm=rms_norm", "optim.warmup_steps=0", "parallel.precision=fp32"]  # fmt: skip
CONFIG = configuration.load(TrainConfig, [], WORDS)
SNAPSHOT: dict = {}  # {how: (bytes, allocations)} of this rank's last snapshot


def build(world):
    with torch.device("meta"):
        model = Transformer(CONFIG.model)
    shard.shard(model, CONFIG.parallel, world)
    optimizer = optim.build_optimizer(dict(model.named_parameters()), CONFIG.optim)
    optim.allocate_state(optimizer)
    shard.init_weights(model, seed=1)
    return model, optimizer


def state(model, optimizer) -> dict:
    tensors = checkpoint_load.state_tensors(model, optimizer)
    steps = {values["step"].item() for values in optimizer.state.values()}
    return {name: tensor.full_tensor().tolist() for name, tensor in tensors.items()} | {"steps": sorted(steps)}


def train_and_save(world, run_dir: Path) -> dict:
    model, optimizer = build(world)
    ids = torch.arange(24).view(3, 8) % 33
    optim.set_lr(optimizer, 1e-2)
    optimizer.found_inf = torch.zeros(())
    for _ in range(3):
        gradients.last_micro_batch(model, True)
        (model(ids, ids).sum() / 100).backward()
        optimizer.step()
        optimizer.zero_grad()
    saver = Checkpointer(run_dir, CheckpointConfig(), world, {"config.yaml": configuration.dump(CONFIG).encode()})
    saver.save(3, model, optimizer, {"data": {}})
    saver.wait()
    buffers = list(saver._host.values())
    saver.close()
    found = state(model, optimizer)
    SNAPSHOT[run_dir.name] = sum(buffer.nbytes for buffer in buffers), len({b.untyped_storage().data_ptr() for b in buffers})
    return found


def load(world, run_dir: Path) -> dict:
    model, optimizer = build(world)
    checkpoint_load.load(folders.folder_of(run_dir, 3), model, optimizer, world)
    return state(model, optimizer)


def replicated(world):
    """The same ranks as copies of the whole state."""
    return dataclasses.replace(world, mesh=init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("replicate", "shard")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{how: (folder, state)} of the same three updates on one rank, on two, and on two copies."""
    folder = tmp_path_factory.mktemp("saved")
    with join_world() as world:
        one = train_and_save(world, folder / "one")
    ranks = on_ranks(2, lambda w: [train_and_save(w, folder / "two"), train_and_save(replicated(w), folder / "copies"), SNAPSHOT])
    two, copies, _ = ranks[0]
    SNAPSHOT["ranks"] = [rank[2] for rank in ranks]
    return {"one": (folder / "one", one), "two": (folder / "two", two), "copies": (folder / "copies", copies)}


@pytest.fixture(scope="module")
def loaded(saved):
    """{(saved how, loaded how): state on each rank}."""
    names = list(saved)
    found = {}
    with join_world() as world:
        for name in names:
            found[name, "one"] = [load(world, saved[name][0])]
    ranks = on_ranks(2, lambda w: [[load(w, saved[name][0]), load(replicated(w), saved[name][0])] for name in names])
    for i, name in enumerate(names):
        found[name, "two"] = [rank[i][0] for rank in ranks]
        found[name, "copies"] = [rank[i][1] for rank in ranks]
    return found


@pytest.mark.parametrize("to", ["one", "two", "copies"])
@pytest.mark.parametrize("of", ["one", "two", "copies"])
def test_what_was_saved_is_loaded_exactly(of, to, saved, loaded):
    for rank in loaded[of, to]:
        assert rank == saved[of][1]
    assert saved[of][1]["steps"] == [3.0]


def test_every_rank_has_written_a_part_of_its_own(saved):
    shards = {how: len(list(folders.folder_of(folder, 3).glob("*.safetensors"))) for how, (folder, _) in saved.items()}
    assert shards == {"one": 1, "two": 2, "copies": 2}


def test_a_rank_snapshots_what_it_writes_in_one_allocation(saved):
    """Replicas hold the same state, and each copies and writes its share of it."""
    expected = 12 * sum(p.numel() for p in Transformer(CONFIG.model).parameters())
    assert SNAPSHOT["one"] == (expected, 1)
    for how in ("two", "copies"):
        sizes, allocations = zip(*(rank[how] for rank in SNAPSHOT["ranks"]), strict=True)
        assert sum(sizes) == expected and max(sizes) < 0.6 * expected and allocations == (1, 1)
        written = [file.stat().st_size for file in folders.folder_of(saved[how][0], 3).glob("*.safetensors")]
        assert sum(written) > expected and max(written) < 0.7 * sum(written)


def test_the_model_alone_is_read_without_any_group(saved):
    for folder, expected in saved.values():
        model = checkpoint_load.load_model(folder)
        assert {f"model.{name}": p.tolist() for name, p in model.named_parameters()}.items() <= expected.items()
        assert not model.training and not torch.distributed.is_initialized()

"""A checkpoint folder of format 1, with q, k, v and up, gate stacked, loads as what it was: weights, moments, losses.

references/format-1 was written by a version that saved format 1, on three ranks, so that its shards end inside of a part.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from ranks import on_ranks
from references.random_models import FALCON, write_random_checkpoint
from torch.distributed.checkpoint import load as dcp_load

from olmo_train import config as configuration
from olmo_train import train as module
from olmo_train.checkpoint.folders import read_state
from olmo_train.checkpoint.format import open_reader
from olmo_train.checkpoint.load import load_model
from olmo_train.errors import CheckpointError
from olmo_train.model.config import ModelConfig
from olmo_train.storage import MANIFEST, commit_folder, write_file
from olmo_train.train_config import TrainConfig

REFERENCE = Path(__file__).parent / "references/format-1"
FOLDER = REFERENCE / "step-0000004"
EXPECTED = json.loads((REFERENCE / "expected.json").read_text())


def stored_whole(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors as they are in the files, the shards of each below one another."""
    shards = [safetensors.torch.load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards if name in shard]) for name in shards[0]}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_weight_and_moment_is_the_rows_of_its_part():
    entries = open_reader(FOLDER).read_metadata().state_dict_metadata
    read = {name: torch.full(entry.size, torch.nan) for name, entry in entries.items()}
    dcp_load(read, storage_reader=open_reader(FOLDER), no_dist=True)
    expected = {}
    for name, value in stored_whole(FOLDER).items():
        rows = {"wqkv": {"wq": 12, "wk": 4, "wv": 4}, "w_in": {"w_up": 12, "w_gate": 12}, "w_out": {"w_down": 12}}
        stacked = next((stacked for stacked in rows if stacked in name), None)
        parts = rows[stacked] if stacked else {None: len(value)}
        values = value.split(list(parts.values()))
        expected |= {name.replace(stacked, part) if part else name: v for part, v in zip(parts, values, strict=True)}
    assert read.keys() == expected.keys() and len(read) == 3 * (2 + 2 * 7)
    assert all(torch.equal(read[name], expected[name]) for name in read)


def test_the_logits_are_those_of_the_version_that_wrote_it():
    with torch.no_grad():
        logits = load_model(FOLDER)(torch.arange(16)[None] * 7 % 32)[0, -1]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits of the last token"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on_with_the_losses_of_the_version_that_wrote_it(tmp_path, size):
    i = np.arange(2000)
    ((i * i // 3 + 7 * i) % 31).astype("<u2").tofile(tmp_path / "tokens.npy")
    words = {"run_dir": tmp_path / "run", "data.sources.a.path": tmp_path / "tokens.npy", "micro_batch_size": 3}
    config = configuration.load(
        TrainConfig, [FOLDER / "config.yaml"], [f"{key}={value}" for key, value in (words | {"resume_from": FOLDER}).items()]
    )

    def run(world):
        return [stats.loss.item() for stats in module.train(config, world)]

    for losses in on_ranks(size, run):
        assert losses == pytest.approx(EXPECTED["losses of steps 5 to 8"], rel=1e-5)
    assert read_state(tmp_path / "run/checkpoints/step-0000008")["format"] == 2


def test_a_model_without_a_gate_loads_from_format_1(tmp_path):
    weights = write_random_checkpoint(tmp_path / "now", ModelConfig(**FALCON))
    then = {name: value for name, value in weights.items() if not re.search("w_up|w_down|w[qkv]", name)}
    for block in ("blocks.0.", "blocks.1."):
        then[f"{block}attn.wqkv.weight"] = torch.cat([weights[f"{block}attn.w{part}.weight"] for part in "qkv"])
        then[f"{block}mlp.w_in.weight"] = weights[f"{block}mlp.w_up.weight"]
        then[f"{block}mlp.w_out.weight"] = weights[f"{block}mlp.w_down.weight"]
    files = {
        "model.safetensors": safetensors.torch.save({f"model.{name}": value for name, value in then.items()}),
        "state.json": json.dumps(read_state(tmp_path / "now") | {"format": 1}).encode(),
        "config.yaml": (tmp_path / "now/config.yaml").read_bytes(),
    }
    (tmp_path / ".then").mkdir()
    commit_folder(tmp_path / ".then", tmp_path / "then", {n: write_file(tmp_path / ".then" / n, c) for n, c in files.items()})
    loaded = dict(load_model(tmp_path / "then").named_parameters())
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_later_format_is_refused(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "later")
    content = json.dumps(read_state(FOLDER) | {"format": 3}).encode()
    manifest = json.loads((tmp_path / "later" / MANIFEST).read_text())
    manifest["files"]["state.json"] = write_file(tmp_path / "later/state.json", content)
    (tmp_path / "later" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="later: has format 3, but this version reads up to 2; update olmo-train"):
        load_model(tmp_path / "later")

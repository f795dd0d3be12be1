"""The losses of the tiny configuration, to five digits: a change of numerics is seen, and must be explained.

Regenerate: python tests/test_golden.py > tests/references/golden_losses.json, and show the losses before and after in the commit.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "references/golden_losses.json"


def losses(folder: Path) -> list[float]:
    from conftest import markov_stream

    from olmo_train import config
    from olmo_train.train import train
    from olmo_train.train_config import TrainConfig

    (folder / "tokens.npy").write_bytes(markov_stream(40_000).tobytes())
    shape = {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden": 176,
        "vocab_size": 512,
        "padded_vocab_size": 512,
        "seq_len": 64,
    }
    values = {
        "run_dir": str(folder / "run"),
        "seed": 3,
        "total_steps": 20,
        "global_batch_size": 8,
        "model": shape,
        "data": {"sources": {"a": {"path": str(folder / "tokens.npy")}}},
        "optim": {"peak_lr": 3e-3, "warmup_steps": 4},
        "parallel": {"precision": "fp32"},
        "log": {"wandb": {"mode": "disabled"}},
    }
    return [stats.loss.item() for stats in train(config.build(TrainConfig, values))]


def test_the_losses_of_the_tiny_configuration_are_those_of_before(tmp_path):
    assert losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr  # the run's own lines
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(losses(Path(scratch)), indent=1), file=stdout)

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
    from conftest import markov_stream, words_of

    from olmo_train import config
    from olmo_train.train import train
    from olmo_train.train_config import TrainConfig

    (folder / "tokens.npy").write_bytes(markov_stream(40_000).tobytes())
    words = words_of(folder / "run", folder / "tokens.npy", total_steps=20, micro_batch_size=None)
    return [stats.loss.item() for stats in train(config.load(TrainConfig, [], words))]


def test_the_losses_of_the_tiny_configuration_are_those_of_before(tmp_path):
    assert losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr  # the run's own lines
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(losses(Path(scratch)), indent=1), file=stdout)

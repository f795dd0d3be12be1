"""Did the run learn more than how often each token occurs? Its last validation losses beside those of unigram models.

A unigram model knows the token frequencies of a training part (each count plus one) and nothing of the context;
its loss on the held-out part is what a language model must fall clearly below.

    python launch/compare_with_unigram.py runs/first-run [--require-below 0.5]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from olmo_train import config


def read_tokens(folder: Path) -> np.ndarray:
    """All token ids of a prepared source, in one array."""
    meta = json.loads((folder / "meta.json").read_text())
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    return np.concatenate([np.fromfile(shard, dtype) for shard in sorted(folder.glob("tokens-*.bin"))])


def unigram_loss(training: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Mean cross-entropy in nats a token of the held-out tokens under the training part's frequencies."""
    counts = np.bincount(training, minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[held_out].mean())


def last_validation_losses(run_dir: Path) -> dict[str, float]:
    """{label: eval/LABEL/CrossEntropyLoss}, the last of each in metrics.jsonl."""
    losses = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if name.startswith("eval/") and name.endswith("/CrossEntropyLoss"):
                losses[name.split("/")[1]] = value
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--require-below", type=float, metavar="NATS", help="exit 1 unless each loss is this far below its unigram loss"
    )
    options = parser.parse_args()
    settings = config.read([options.run_dir / "config.yaml"])
    losses = last_validation_losses(options.run_dir)
    too_high = []
    print(f"{'held-out part of':<18}{'unigram loss':>14}{'model loss':>14}   (nats a token)")
    for name, source in settings["data"]["validation"].items():
        training = read_tokens(Path(settings["data"]["sources"][name]["path"]))
        unigram = unigram_loss(training, read_tokens(Path(source["path"])), settings["model"]["vocab_size"])
        print(f"{name:<18}{unigram:>14.3f}{losses[name]:>14.3f}")
        if options.require_below is not None and not losses[name] < unigram - options.require_below:
            too_high.append(name)
    if too_high:
        print(f"error: {options.run_dir}: too near to the unigram loss: {', '.join(too_high)}", file=sys.stderr)
    return bool(too_high)


if __name__ == "__main__":
    sys.exit(main())

"""The number of processes and the size of a micro-batch change speed and memory, and nothing else."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from data_sources import prepare_source

from olmo_train.data.config import SourceConfig
from olmo_train.data.shards import open_source
from olmo_train.train import train

STEPS = 30


def relative(a, b, name="train/CrossEntropyLoss"):
    return max(abs(x[name] / y[name] - 1) for x, y in zip(a, b, strict=True))


@pytest.fixture
def alone(tiny_args, read_metrics):
    """alone(name, **changes): the metrics of a run of this process."""

    def run(name, **changes):
        config = tiny_args(name, **{"total_steps": STEPS, **changes})
        for _ in train(config):
            pass
        return read_metrics(config.run_dir)

    return run


def test_two_processes_train_as_one(alone, run_cli, tiny_words, read_metrics, tmp_path):
    one = alone("one")
    done = run_cli("train", *tiny_words("two", total_steps=STEPS), nproc=2)
    assert done.returncode == 0, done.stderr
    two = read_metrics(tmp_path / "two")
    assert [line["sample_hash"] for line in one] == [line["sample_hash"] for line in two]
    assert {line["world_size"] for line in two} == {2}
    assert relative(one, two) < 1e-6
    assert relative(one, two, "optim/total_grad_norm") < 1e-5
    assert [line["optim/learning_rate_group0"] for line in one] == [line["optim/learning_rate_group0"] for line in two]
    assert one[-1]["train/CrossEntropyLoss"] < one[0]["train/CrossEntropyLoss"] - 0.3  # there was something to agree on


def test_the_size_of_a_micro_batch_changes_nothing(alone):
    runs = [alone(f"micro-{rows}", micro_batch_size=rows) for rows in (2, 4, 8)]
    assert runs[0][-1]["train/CrossEntropyLoss"] < runs[0][0]["train/CrossEntropyLoss"] - 0.3
    for other in runs[1:]:
        assert [line["sample_hash"] for line in other] == [line["sample_hash"] for line in runs[0]]
        assert relative(runs[0], other) < 1e-6


def test_bf16_with_fp32_reduction_trains_on_two_processes(run_cli, tiny_words, read_metrics, tmp_path, alone):
    """bf16 rounds away 8 bits, so worlds agree less closely than in fp32, and still closely."""
    one = alone("one", total_steps=12, **{"parallel.precision": "bf16"})
    words = tiny_words("two", total_steps=12, **{"parallel.precision": "bf16"})
    done = run_cli("train", *words, nproc=2)
    assert done.returncode == 0, done.stderr
    assert relative(one, read_metrics(tmp_path / "two")) < 2e-3
    exact = alone("exact", total_steps=12)
    assert 1e-7 < relative(one, exact) < 1e-2  # bf16 was really used, and is close to fp32


def test_unevenly_masked_labels_train_as_in_one_process(alone, run_cli, tiny_words, read_metrics, tmp_path):
    """Prompts are not scored, so ranks and micro-batches differ in how many tokens count."""
    generator = random.Random(0)
    records = [{"prompt": " ".join(["the cat"] * generator.randint(1, 60)), "response": "sat on a mat " * generator.randint(0, 4)}
               for _ in range(80)]  # fmt: skip
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder, _ = prepare_source(tmp_path, file)
    changes = {"data.sources.a.path": folder, "total_steps": 10, "micro_batch_size": 1}
    one = alone("one", **changes)
    done = run_cli("train", *tiny_words("two", **changes), nproc=2)
    assert done.returncode == 0, done.stderr
    two = read_metrics(tmp_path / "two")
    whole = alone("whole", **changes | {"micro_batch_size": 8})
    for other in (two, whole):
        assert relative(one, other) < 1e-6 and relative(one, other, "optim/total_grad_norm") < 1e-5
    shares = [mask_share(folder, *span) for span in ((0, 64), (64, 128), (128, 192), (192, 256))]
    assert len(set(shares)) > 1  # the masks are uneven indeed


def mask_share(folder, start, stop):
    mask = np.empty(stop - start, dtype=np.uint8)
    open_source("a", SourceConfig(str(folder)), 512).read_label_mask(start, mask)
    return mask.mean()


def test_a_world_of_one_leaves_nothing_behind_when_it_is_killed(tmp_path):
    """It needs neither a port nor a file to meet the other processes that it does not have."""
    program = (
        "import os, signal\nfrom olmo_train.parallel.world import join_world\n"
        "with join_world() as world:\n    assert world.any(3) == 3\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == -signal.SIGKILL and list(tmp_path.iterdir()) == []

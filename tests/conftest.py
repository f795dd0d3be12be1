"""What the tests share: few threads, no W&B, a tiny token stream, a tiny model, and the command line as a process.

tiny_tokens          a raw uint16 token file of a stream that a small model begins to learn within a dozen steps
tiny_words(...)      the key=value words of a run on it, as a user would type them
tiny_args(...)       the same as a TrainConfig
run_main(*words)     the command line in this process
run_cli(*words)      python -m olmo_train WORDS, or under torchrun with nproc=2, which takes seconds of imports
read_metrics(dir)    metrics.jsonl as a list of dicts
"""

import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

# Set before torch and OpenMP are loaded: test workers and torchrun share few cores, and busy waiting starves them.
FEW_THREADS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(FEW_THREADS)
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")
# Many tests fork ranks, which works without a GPU only, so the tests that use one run alone: pytest tests/test_gpu.py.
GPU_TESTS = {"test_gpu.py", "test_speed.py"}
named = {Path(word.partition("::")[0]).name for word in sys.argv[1:] if ".py" in word}
if "PYTEST_XDIST_WORKER" not in os.environ and (not named or named - GPU_TESTS):  # a worker inherits what was decided
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402

VOCAB_SIZE = 512
EOS_ID = 511


def markov_stream(n_tokens: int, seed: int = 1) -> array:
    """Token ids below 512: each follows from the one before up to a choice of three; at times 511 ends a document."""
    rng, word, ids = random.Random(seed), 1, array("H")
    for _ in range(n_tokens):
        word = (word * 5 + rng.choice((1, 2, 3))) % EOS_ID
        ids.append(word if rng.random() > 0.01 else EOS_ID)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums on every machine: the number of threads changes the order of a reduction."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def stream() -> bytes:
    """40,000 tokens in the raw layout: little-endian uint16, no header."""
    return markov_stream(40_000).tobytes()


@pytest.fixture
def tiny_tokens(tmp_path, stream) -> Path:
    file = tmp_path / "tokens.npy"
    file.write_bytes(stream)
    return file


@pytest.fixture
def held_out(tmp_path, stream) -> Path:
    """44 instances for validation: a run evaluates them at once, and all the tokens of a source not so soon."""
    file = tmp_path / "held-out.npy"
    file.write_bytes(stream[: 2 * (44 * 64 + 1)])
    return file


def words_of(run_dir: Path, tokens: Path, /, **changes) -> list[str]:
    """The key=value words of a 12-step run; a change's key may be dotted, and None leaves the key out."""
    values = {
        "run_dir": run_dir, "seed": 3, "total_steps": 12, "global_batch_size": 8, "micro_batch_size": 4,
        "model.d_model": 64, "model.n_layers": 2, "model.n_heads": 4, "model.mlp_hidden": 176, "model.seq_len": 64,
        "model.vocab_size": VOCAB_SIZE, "model.padded_vocab_size": VOCAB_SIZE, "data.sources.a.path": tokens,
        "optim.peak_lr": 3e-3, "optim.warmup_steps": 4, "parallel.precision": "fp32", "checkpoint.interval_steps": 5,
        "log.interval_steps": 1, "log.wandb.mode": "disabled",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**values, **changes}.items() if value is not None]


@pytest.fixture
def tiny_words(tmp_path, tiny_tokens):
    """tiny_words(name, **changes): the words of a 12-step run in tmp_path/name."""
    return lambda name="run", **changes: words_of(tmp_path / name, tiny_tokens, **changes)


@pytest.fixture
def tiny_args(tiny_words):
    """tiny_args(name, **changes): the TrainConfig that those words make."""

    def args(name: str = "run", **changes):
        from olmo_train import config
        from olmo_train.train_config import TrainConfig

        return config.load(TrainConfig, [], tiny_words(name, **changes))

    return args


@pytest.fixture
def run_main(capfd, tmp_path, monkeypatch):
    """run_main(*words): as run_cli, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> subprocess.CompletedProcess:
        from olmo_train.__main__ import main

        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit:
            code = exit.code
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


@pytest.fixture
def run_cli(tmp_path):
    """run_cli(*words, nproc=0, timeout=300, **environment): the command line in a separate process, in tmp_path."""

    def run(*words, nproc: int = 0, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc else []
        repository = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *torchrun, "-m", "olmo_train", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env={**os.environ, **FEW_THREADS, "PYTHONPATH": path, **environment},
        )

    return run


@pytest.fixture
def read_metrics():
    """read_metrics(run_dir): the lines of metrics.jsonl that hold a training step."""

    def read(run_dir: Path) -> list[dict]:
        from runs import LOSS, lines_of

        return [line for line in lines_of(run_dir) if LOSS in line]

    return read

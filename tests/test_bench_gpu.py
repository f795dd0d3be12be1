"""The script for a machine with a GPU, rehearsed where there is none, without the packages that such a machine lacks."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from runs import load_script

SCRIPT = Path(__file__).parent / "benchmarks/gpu.py"
# Of the packages installed here, those that an image with CUDA and torch for research has.
BARE = (
    "torch", "triton", "numpy", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "setuptools",
    "typing-extensions", "pyarrow", "safetensors", "tokenizers", "transformers", "huggingface-hub", "hf-xet", "httpx",
    "httpcore", "h11", "anyio", "sniffio", "regex", "tqdm", "requests", "urllib3", "certifi", "idna", "charset-normalizer",
    "packaging", "pyyaml", "rich", "markdown-it-py", "mdurl", "pygments", "matplotlib", "contourpy", "cycler", "fonttools",
    "kiwisolver", "pillow", "pyparsing", "python-dateutil", "six", "click", "typer", "shellingham", "tensorboard", "protobuf",
    "pytest", "iniconfig", "pluggy", "pytest-xdist", "execnet", "hypothesis", "sortedcontainers", "nvidia-ml-py",
)  # fmt: skip
BUNDLED = ("omegaconf",)  # of gpu-bundle/packages; torchao is only for float8
HOOK = """
import importlib.machinery, sys

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in {hidden!r}:
            path = [{bundle!r}]
        return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
"""


@pytest.fixture
def bare(tmp_path):
    """The environment of a process in which only BARE and a bundle of BUNDLED can be imported."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in BUNDLED:
        (bundle / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    owners = importlib.metadata.packages_distributions().items()
    here = {module for module, names in owners if any(re.match("nvidia|cuda|olmo-train", plain(n)) for n in names)}
    hidden = {module for module, names in owners if not any(plain(name) in BARE for name in names)} - here
    assert {"omegaconf", "wandb", "plotly"} <= hidden
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(HOOK.format(hidden=hidden, bundle=str(bundle)))
    return {**os.environ, "PYTHONPATH": str(tmp_path / "hook")}


@pytest.mark.slow
def test_on_a_bare_machine_a_failing_row_is_reported_and_the_other_parts_are_measured(tmp_path, bare):
    parts = "row:64x2:model.norm=none,row:64x2:selective,tests:not_finite"  # one test stands for all
    words = [sys.executable, SCRIPT, "--tiny", "--parts", parts, "--output", tmp_path / "out"]
    out = subprocess.run(words, env=bare, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    failed, row, tests = json.loads((tmp_path / "out/gpu.json").read_text())["parts"].values()
    assert failed["error"].startswith("error: model.norm: ")
    assert row["tokens_per_second"] > 0 and row["planned_bytes"] > 0
    assert sum(row["phase_seconds"].values()) > 0 and min(row["phase_seconds"].values()) >= 0
    assert list(tests["outcomes"].values()) == ["PASSED"], tests
    assert out.stdout.strip().endswith((tmp_path / "out/gpu.md").read_text().strip())


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_processor_is_measured_on_two_cores_without_the_gpu(script, monkeypatch):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)  # the tests' own limit
    allowed = os.sched_getaffinity(0)
    found = script.run_cpu("cpu", script.Commands(300), tiny=True)
    assert os.sched_getaffinity(0) == allowed
    machine, work, *rows = [line for line in found["said"] if line and line != "```"]
    assert f"{min(2, len(allowed))} thread" in machine and work.startswith("[1, 2, 2, 64, 32], bf16")
    names, times = zip(*(re.match(r"(.+?)  +([\d.]+) ", row).groups() for row in rows[1:]), strict=True)
    assert names[0].startswith("ours, ") and names[-1] == "torch" and all(float(ms) > 0 for ms in times)
    results = {"device": "x", "torch": "x", "python": "x", "commit": "x", "parts": {"cpu": found}}
    assert f"## cpu\n\n```\n{machine}\n" in script.report(results)


@pytest.fixture
def script():
    return load_script(SCRIPT)


def test_parts_are_expanded_once_and_a_wrong_one_is_refused_before_anything_runs(script):
    assert script.expanded(["tests", "muon", "row:2048x8:muon"]) == ["tests", "row:2048x8:muon"]
    for group in script.ORDER:
        assert script.expanded([group])
    for wrong in ("benches", "row:2048", "row:2048x8:quick"):
        with pytest.raises(ValueError, match=wrong.split(":")[-1]):
            script.expanded([wrong])


def test_every_row_is_a_configuration(script):
    from olmo_train import config
    from olmo_train.train_config import TrainConfig

    for rows in script.ROWS.values():
        for row in rows:
            file, *words = script.row_words(row)
            built = config.load(TrainConfig, [file], [*words, "run_dir=x", "data.sources.a.path=x"])
            assert built.tokens_per_step == (262_144 if "262144" in row else 65_536), row
            assert built.parallel.compile == (not {"eager", "world"} & {*row.split(":")}), row
    assert script.row_words("4096x3")[2] == "global_batch_size=15"  # whole micro-batches


def test_only_the_tests_of_a_gpu_see_it_when_they_run_alone_and_ranks_are_not_forked_there(monkeypatch):
    for files, worker, seen in (
        ("tests/test_gpu.py tests/test_speed.py::test_x", None, "0"),
        ("tests/test_gpu.py tests/test_loss.py", None, ""),
        ("", None, ""),
        ("", "gw0", "0"),  # xdist starts a worker without the words, after its parent has decided
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        if worker:
            monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        monkeypatch.setattr(sys, "argv", ["pytest", "-v", *files.split()])
        load_script(Path(__file__).parent / "conftest.py")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen, (files, worker)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AssertionError, match="two ranks would share one GPU"):
        on_ranks(2, lambda world: world.rank)


def test_peers_run_one_after_the_other_each_with_its_folder_of_the_bundle(script, monkeypatch, tmp_path):
    (tmp_path / "peers/litgpt").mkdir(parents=True)
    monkeypatch.setattr(script, "BUNDLE", tmp_path)
    called = []
    commands = SimpleNamespace(python=lambda *words: called.extend(words) or (0, "litgpt is skipped: why\n", ""))
    assert script.run_peers("peers", commands, tiny=False) == {"said": ["litgpt is skipped: why"]}
    assert "--in-turn" in called and called[called.index("--at") + 1] == f"litgpt={tmp_path}/peers/litgpt"


def test_a_command_is_stopped_at_the_deadline_and_none_is_started_after_it(script, monkeypatch):
    monkeypatch.setattr(script, "LEAST", 0)
    code, said, error = script.Commands(6).python("-c", "import time; print('begun', flush=True); time.sleep(60)")
    assert (code, said) == (124, "begun\n") and "stopped" in error
    monkeypatch.setattr(script, "LEAST", 20)
    code, _, error = script.Commands(10).python("-c", "raise SystemExit(3)")
    assert code == 124 and "not started" in error


def test_the_report_has_what_failed_beside_what_did_not(script):
    phases = dict.fromkeys(("forward", "backward", "clip", "optimizer", "other"), 0.1)
    row = {"tokens_per_second": 1000.0, "mfu": 0.55, "step_seconds": 0.5, "first_step_seconds": 20.0, "phase_seconds": phases}
    row |= {"peak_memory_bytes": 4e9, "planned_bytes": 5e9}
    contestant = {"version": "2", "tokens_per_second": [900.0, 910.0], "peak_gb": 3.0, "first_step_seconds": 2.0}
    parts = {
        "row:2048x8": row,
        "row:2048x8:float8": {**row, "tokens_per_second": 1250.0, "mfu": None},
        "row:2048x8:full": {"error": "error: out of memory"},
        "row:2048x8:262144": row,
        "tests": {
            "outcomes": {"test_a": "PASSED", "test_b": "FAILED"},
            "reasons": ["FAILED x - assert 1"],
            "said": "assert 1 == 2",
        },
        "peers": {"said": ["litgpt is skipped: not installed"], "figures": {"ours": contestant, "half": {"version": "1"}}},
    }
    text = script.report({"device": "gpu", "torch": "2", "python": "3", "commit": "c", "parts": parts})
    for words in (
        "1 of 2 passed",
        "test_b: FAILED",
        "assert 1 == 2",
        "error: out of memory",
        "litgpt is skipped",
        "| ours | 2 | 905",
    ):
        assert words in text
    assert "| 2048x8:float8 | 1,250 | 1.25 | unknown |" in text
    assert "| 2048x8:262144 | 1,000 |  | 55.0% |" in text

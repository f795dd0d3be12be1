"""The script for a machine with a GPU, rehearsed from end to end where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

from runs import load_script

SCRIPT = Path(__file__).parent / "benchmarks/gpu.py"


def test_a_rehearsal_makes_the_complete_table(tmp_path):
    words = [sys.executable, SCRIPT, "--tiny", "--no-peers", "--output", tmp_path]
    few = {"PYTEST_ADDOPTS": "-k not_finite"}  # one test stands for all
    out = subprocess.run(words, env={**os.environ, **few}, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results["tests"]["outcomes"].values()) == ["PASSED"]
    assert [row["activation_checkpointing"] for row in results["bench"]] == ["selective"]
    assert all(row["tokens_per_second"] > 0 and row["planned_bytes"] > 0 for row in results["bench"])
    assert out.stdout.strip() == (tmp_path / "gpu.md").read_text().strip()


def test_failures_are_listed_beside_what_passed():
    script = load_script(SCRIPT)
    row = {"seq_len": 4096, "micro_batch_size": 8, "activation_checkpointing": "selective", "error": "error: out of memory"}
    tests = {"outcomes": {"test_a": "PASSED", "test_b": "FAILED"}, "said": "assert 1 == 2"}
    peers = {"olmo-1b-2048": {"litgpt": {"table": "", "error": "not installed"}}}
    results = {"device": "gpu", "torch": "2", "seconds": 3.0, "tests": tests, "bench": [row], "peers": peers}
    text = script.report(results)
    for words in ("1 of 2 passed", "test_b: FAILED", "assert 1 == 2", "error: out of memory", "not installed"):
        assert words in text

"""doctor: what it finds is what is so, and each problem comes with a remedy."""

import json
import shutil

import pytest

from olmo_train.parallel import cpu_kernels
from olmo_train.tools import doctor


def by_check(findings):
    return {finding.check: finding for finding in findings}


def test_a_healthy_configuration_has_no_problem_and_shows_epochs_and_disk(tiny_args):
    findings = by_check(doctor.examine(tiny_args()))
    assert not [finding for finding in findings.values() if finding.status == "problem"]
    assert "40,000 tokens, read 0.15 times" in findings["data a"].finding  # 12 steps x 8 of 624 instances
    assert "GB free" in findings["disk"].finding
    assert findings["wandb"].finding == "will be disabled"


def test_many_epochs_are_warned_of(tiny_args):
    finding = by_check(doctor.examine(tiny_args(total_steps=1000)))["data a"]
    assert finding.status == "warning" and "4 epochs" in finding.remedy


def test_missing_data_is_a_problem_with_its_file(tiny_args, tmp_path):
    findings = doctor.examine(tiny_args(**{"data.sources.a.path": tmp_path / "none.npy"}))
    (problem,) = [finding for finding in findings if finding.status == "problem"]
    assert "none.npy" in problem.check + problem.finding and problem.remedy


def test_a_batch_that_does_not_fit_the_processes_is_a_problem(tiny_args, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    (problem,) = [finding for finding in doctor.examine(tiny_args()) if finding.status == "problem"]
    assert problem.check == "global_batch_size" and "use 6 or 9" in problem.finding


def test_the_cache_and_a_launchers_environment_that_is_incomplete_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache,) = doctor.cache()
    assert (cache.status, cache.finding) == ("ok", f"{tmp_path}/olmo_train")
    assert [f.finding for f in doctor.launcher()] == ["none: one process"]
    monkeypatch.setenv("RANK", "0")
    (launcher,) = doctor.launcher()
    assert launcher.status == "warning" and "has RANK=0, but not WORLD_SIZE" in launcher.finding


def test_the_verb_prints_json_and_exits_by_the_findings(run_main, tiny_words):
    done = run_main("doctor", *tiny_words(), "--json")
    assert done.returncode == 0 and {"environment", "gpus", "network"} <= {f["check"] for f in json.loads(done.stdout)}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_kernels_of_attention_are_reported_and_a_compiler_that_fails_is_a_problem(tiny_args, monkeypatch, tmp_path):
    asked, left = tiny_args(**{"parallel.cpu_kernels": True}), tiny_args()
    for config in (asked, left):
        assert by_check(doctor.examine(config))["kernels"].finding.startswith("attention and loss use the C++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "c++ -no-such-option")
    cpu_kernels.library.cache_clear()
    problem = by_check(doctor.examine(asked))["parallel.cpu_kernels"]
    assert problem.status == "problem" and "no-such-option" in problem.finding
    finding = by_check(doctor.examine(left))["kernels"]
    assert finding.status == "ok" and "use torch" in finding.finding and "compiler" in finding.remedy

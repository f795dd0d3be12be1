"""W&B has what metrics.jsonl has, each step once, whatever happened to the run; and whatever happens to W&B, the run continues.

The real client, read back by its own `wandb leet inspect` or by a stand-in for its server.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import exit_code, fork
from references.wandb_stub import Server
from runs import lines_of, wait_for

from olmo_train.__main__ import main
from olmo_train.log import wandb as log_wandb

WANDB = Path(sys.executable).parent / "wandb"


@pytest.fixture
def start(tiny_words, tmp_path):
    """start(url, **changes): the pid of a run that mirrors to W&B, offline or to the server at `url`."""

    def begin(url: str | None = None, wandb: dict[str, str] | None = None, **changes) -> int:
        no_warning = {"optim.warmup_steps": 0, "optim.schedule": "constant"}  # however long a run is, or grows
        words = tiny_words("run", **{"log.wandb.mode": "auto", "model.n_layers": 1, **no_warning, **changes})

        def run() -> int:
            for name in [name for name in os.environ if name.startswith("WANDB_")]:
                del os.environ[name]
            os.environ |= {f"WANDB_{name}": value for name, value in (wandb or {}).items()}
            if url:
                os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}
            os.chdir(tmp_path)
            log_wandb.PATIENCE = 4  # seconds: the run's patience with W&B is cut short, so that the tests are
            return main(["train", *words])

        (tmp_path / "stderr").write_text("")
        return fork(run, tmp_path / "stderr", HOME=str(tmp_path))

    return begin


@pytest.fixture
def finished(tmp_path):
    """finished(pid): the warnings of a run that ended well."""

    def warnings(pid: int) -> list[str]:
        code, stderr = exit_code(pid, 120), (tmp_path / "stderr").read_text()
        assert code == 0, stderr
        return [line for line in stderr.splitlines() if line.strip()]

    return warnings


def killed_at(pid: int, run_dir: Path, step: int) -> None:
    wait_for(run_dir, step)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL


def records(run_dir: Path) -> list[dict]:
    """What W&B wrote offline, over all attempts, as its own reader tells it."""
    found = []
    for log in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        shown = subprocess.run([WANDB, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True)
        found += [json.loads(line) for line in shown.stdout.splitlines()]
    return found


def plain(row: dict) -> dict:
    return {key: value for key, value in row.items() if key == "_step" or not key.startswith("_")}


def logged(run_dir: Path) -> list[dict]:
    """metrics.jsonl as W&B should have it: metrics alone, the step under W&B's name for it."""
    others = ("time", "attempt", "world_size", "sample_hash")
    numbers = [{key: v for key, v in line.items() if key not in others} for line in lines_of(run_dir)]
    return [{"_step" if key == "step" else key: v for key, v in line.items()} for line in numbers]


def test_offline_history_equals_the_metrics_after_two_kills_and_a_resume(start, finished, tmp_path):
    run_dir = tmp_path / "run"
    changes = {"total_steps": 24, "log.interval_steps": 1, "checkpoint.interval_steps": 5}
    killed_at(start(**changes), run_dir, 8)
    killed_at(start(**changes), run_dir, 18)
    assert finished(start(**changes)) == []
    rows = [plain(record["history"]["item"]) for record in records(run_dir) if record["type"] == "history"]
    assert [row["_step"] for row in rows] == list(range(1, 25))
    assert rows == logged(run_dir)
    ids = {record["run"]["run_id"] for record in records(run_dir) if record["type"] == "run"}
    assert ids == {(run_dir / "wandb/id").read_text()}
    kinds = [path.name.split("-")[0] for path in (run_dir / "wandb").glob("*-run-*")]
    assert sorted(kinds) == ["killed", "killed", "offline"]  # `wandb sync` takes those that begin with `offline`


def test_name_group_tags_configuration_and_code_version_are_sent(start, finished, tmp_path):
    changes = {"log.wandb.group": "tiny", "log.wandb.name": "first", "log.wandb.tags": "[a,b]", "log.wandb.project": "p"}
    assert finished(start(total_steps=3, **changes)) == []
    sent = records(tmp_path / "run")
    run = next(record["run"] for record in sent if record["type"] == "run")
    assert (run["project"], run["run_group"], run["display_name"], run["tags"]) == ("p", "tiny", "first", ["a", "b"])
    config = run["config"]["update"]
    assert config["total_steps"] == 3 and config["optim"]["peak_lr"] == 3e-3 and "code_version" in config
    defined = [record["metric"]["name"] for record in sent if record["type"] == "metric"]
    assert "throughput/total_tokens" in defined
    assert any(record["type"] == "stats" for record in sent)  # system metrics
    summary = {}
    for record in sent:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    last = logged(tmp_path / "run")[-1]
    assert {key: summary[key] for key in last} == last
    assert (summary["attempt"], summary["world_size"]) == (1, 1)
    folders = [path.name for path in (tmp_path / "run/wandb").iterdir() if path.is_dir() or path.name.startswith("run-")]
    assert len([name for name in folders if "run-" in name]) == 1, "wandb leet lists one run"


def test_the_environment_fills_in_what_the_configuration_leaves_open(start, finished, tmp_path):
    words = {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b", "ENTITY": "e", "MODE": "OFFLINE"}
    assert finished(start(wandb=words, total_steps=1)) == []
    runs = [record["run"] for record in records(tmp_path / "run") if record["type"] == "run"]
    sent = [(r["project"], r["display_name"], r["run_group"], r["tags"], r["entity"]) for r in runs]
    assert sent == [("p", "n", "g", ["a", "b"], "e")]


def test_a_server_gets_each_step_once_over_a_kill_and_a_resume(start, finished, tmp_path):
    run_dir = tmp_path / "run"
    changes = {"total_steps": 16, "log.interval_steps": 1, "checkpoint.interval_steps": 5}
    with Server("works") as server:
        assert finished(start(server.url, **changes | {"total_steps": 6})) == []
        killed_at(start(server.url, **changes), run_dir, 9)
        assert finished(start(server.url, **changes)) == []
        (run,) = server.runs
        rows = sorted(server.history[run], key=lambda row: row["_step"])
    assert run == (run_dir / "wandb/id").read_text()
    assert [row["_step"] for row in rows] == list(range(1, 17))
    trained = ("train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate_group0", "throughput/total_tokens")
    expected = [[line[name] for name in trained] for line in logged(run_dir)]
    assert [[row[name] for name in trained] for row in rows] == expected


@pytest.mark.parametrize("manner", ["refuses", "hangs", "dies", "is not there"])
def test_a_run_with_a_broken_server_finishes_with_complete_metrics_and_at_most_one_warning(start, finished, tmp_path, manner):
    with Server(manner) as server:
        if manner == "is not there":
            server.stop()
        warnings = finished(start(server.url, total_steps=6, **{"log.interval_steps": 1}))
    assert len(warnings) <= 1 and all(line.startswith("WARNING: W&B ") for line in warnings), warnings
    assert len(warnings) == 1 or manner == "dies"  # which W&B's client keeps to itself; its file has all
    assert [line["_step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    if manner != "dies":  # recorded offline instead, to be sent later
        rows = [plain(record["history"]["item"]) for record in records(tmp_path / "run") if record["type"] == "history"]
        assert rows == logged(tmp_path / "run")


def test_a_folder_that_wandb_cannot_use_is_one_warning(start, finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/wandb").write_text("a file in the way")
    (warning,) = finished(start(total_steps=3, **{"log.interval_steps": 1}))
    assert warning.startswith("WARNING: W&B is disabled: ") and "run/wandb" in warning
    assert [line["_step"] for line in logged(tmp_path / "run")] == [1, 2, 3]

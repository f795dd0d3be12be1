"""ladder: ordinary runs of several sizes and lengths that share their stable phases, and a forecast before a large run."""

import json
import os
import shlex
import subprocess

import numpy as np
import pytest
from runs import LOSS, SAME, cut, events_of, lines_of, trained
from test_sweep import Forked

from olmo_train import config as configuration
from olmo_train.checkpoint.folders import committed
from olmo_train.errors import ConfigError
from olmo_train.formats import duration
from olmo_train.model.cost import flops_per_token
from olmo_train.predict import sweep
from olmo_train.predict.fit import read_points
from olmo_train.predict.ladder import parameters_of, plan_ladder, words_of
from olmo_train.storage import hash_file
from olmo_train.train_config import TrainConfig

SIZES = "16x1,32x1,48x1"
MULTIPLES = "0.01,0.02"  # 0.2 and 0.4 tokens per parameter: 5 to 41 steps
CHANGES = {"model.n_layers": 1, "total_steps": None, "optim.warmup_steps": 2, "checkpoint.interval_steps": 1000,
           "eval.interval_steps": 1000, "optim.decay_shape": "1-sqrt", "optim.schedule": "wsd"}  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """The run_dirs that were trained, as forked children, which skips the imports."""
    names = []

    def start(point, environment):
        names.append("/".join(point.run_dir.parts[-2:]))
        return Forked(point, environment)

    monkeypatch.setattr(sweep, "start", start)
    return names


@pytest.fixture
def words(tiny_words, held_out):
    return tiny_words("ladder", **CHANGES, **{"data.validation.v.path": held_out})


def planned(words, sizes=SIZES, multiples=(0.01, 0.02), decay=0.2):
    return plan_ladder([], words, sizes.split(","), multiples, decay)


def test_a_ladder_trains_branches_that_are_straight_runs_fits_them_and_forecasts_another(words, started, run_main, tmp_path):
    line = ["ladder", *words, "--sizes", SIZES, "--multiples", MULTIPLES, "--forecast", "100000,200000"]
    done = run_main(*line)
    assert done.returncode == 0, done.stderr
    folder, rungs = tmp_path / "ladder", planned(words).rungs
    assert started[:3] == ["48x1/stable", "48x1/0.02x", "48x1/0.01x"] and len(started) == 9
    for rung in rungs[1:2]:  # the shorter one of the largest size
        assert rung.start / rung.point.config.steps == pytest.approx(0.8, abs=0.02)
        straight = configuration.load(
            TrainConfig, [], [*rung.point.words, "resume_from=null", f"run_dir={tmp_path}/straight-{rung.multiple}"]
        )
        trained(straight)
        branch = rung.point.run_dir
        assert [event["step"] for event in events_of(branch, "branch")] == [rung.start]
        lines = [[line[name] for name in SAME] for line in lines_of(straight.run_dir) if LOSS in line]
        assert [[line[name] for name in SAME] for line in lines_of(branch) if LOSS in line] == lines[rung.start :]
        assert lines_of(branch)[-1]["eval/v/CrossEntropyLoss"] == lines_of(straight.run_dir)[-1]["eval/v/CrossEntropyLoss"]
        last = [committed(run)[rung.point.config.steps] for run in (branch, tmp_path / f"straight-{rung.multiple}")]
        weights = sorted(path.name for path in last[0].glob("*.safetensors"))
        assert weights and all(hash_file(last[0] / name) == hash_file(last[1] / name) for name in weights)

    points = read_points(folder / "ladder.csv", "loss")
    measured = [lines_of(rung.point.run_dir)[-1]["eval/v/CrossEntropyLoss"] for rung in rungs]
    assert points.losses.tolist() == measured and points.tokens.tolist() == [rung.tokens for rung in rungs]
    page = (folder / "ladder.html").read_text()
    assert page.count("<svg") == 4 and "<script" not in page and "forecast for 100k parameters, 200k tokens" in page
    (record,) = json.loads((folder / "forecasts.json").read_text())
    assert len(record["inputs"]) == 12 and f"inputs: sha256 {record['inputs_sha256']}" in done.stdout
    rates = [line["throughput/tokens_per_second"] for line in lines_of(rungs[0].point.run_dir) if LOSS in line]
    seconds = 6 * 100_000 * 200_000 / (np.median(rates) * flops_per_token(rungs[0].point.config.model))
    assert f"it trains with 120B FLOPs: {duration(seconds)} at the speed of 48x1 0.02x; name its GPU" in done.stdout

    again = run_main(*line, "--json")
    assert again.returncode == 0 and len(started) == 9
    assert json.loads(again.stdout)["forecast"] == record["forecast"]
    assert json.loads((folder / "forecasts.json").read_text()) == [record], "the same forecast keeps its time"

    # A multiple in between goes on from the start of the branch before, as its own was not saved.
    done = run_main(*[MULTIPLES.replace(",", ",0.015,") if word == MULTIPLES else word for word in line])
    again = [f"{size}/{name}" for size in ("48x1", "32x1", "16x1") for name in ("stable", "0.015x")]  # stable has nothing to do
    assert done.returncode == 0 and started[9:] == again, done.stderr
    longer, between, shorter = planned(words, multiples=(0.01, 0.015, 0.02)).rungs[:3]
    assert between.start == shorter.start < between.point.config.steps - between.point.config.optim.decay_steps < longer.start
    assert [event["step"] for event in events_of(between.point.run_dir, "branch")] == [between.start]
    straight = [*between.point.words, "resume_from=null", f"run_dir={tmp_path}/straight-between"]
    trained(configuration.load(TrainConfig, [], straight))
    branch, whole = (
        [line[LOSS] for line in lines_of(run) if LOSS in line] for run in (between.point.run_dir, tmp_path / "straight-between")
    )
    assert branch == whole[between.start :]

    # the target, after its forecast
    size = words_of("64x1", [], words)
    target = configuration.load(TrainConfig, [], [*words, *size, "total_steps=40", f"run_dir={folder}/target"])
    n, d = parameters_of(target.model), target.tokens_by(40)
    assert run_main("ladder", "--check", target.run_dir).returncode == 2  # does not exist
    assert run_main(*line[:-1], f"{n},{d}").returncode == 0 and len(started) == 15
    trained(target)
    done = run_main("ladder", "--check", target.run_dir)
    loss = lines_of(target.run_dir)[-1]["eval/v/CrossEntropyLoss"]
    record = json.loads((folder / "forecasts.json").read_text())[-1]["forecast"]
    assert done.returncode == 0 and f"{loss:.4f}" in done.stdout and f"forecast: {record['loss']:.4f}" in done.stdout
    assert ("inside the interval" in done.stdout) == (record["low"] <= loss <= record["high"]) and "note:" not in done.stdout

    (folder / "16x1/0.01x/metrics.jsonl").write_text("")
    assert "note: 1 input of the forecast changed since" in run_main("ladder", "--check", target.run_dir).stdout
    records = json.loads((folder / "forecasts.json").read_text())
    records[-1]["time"] += 1e6
    (folder / "forecasts.json").write_text(json.dumps(records))
    assert "note: the forecast was written after the run had started" in run_main("ladder", "--check", target.run_dir).stdout
    done = run_main("ladder", f"run_dir={folder}", "--check", folder / "48x1/0.02x")
    assert done.returncode == 2 and "has no forecast for" in done.stderr


@pytest.mark.slow
def test_a_size_that_fails_is_reported_and_the_others_go_on_and_resume(words, started, run_main, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("optim: {peak_lr: 1e30}\nguards: {max_skipped: 1}\n")  # 64 wide
    words = [word for word in words if "peak_lr" not in word]  # which would hold for all sizes
    cut(planned(words).points[0].config, steps=planned(words).rungs[1].start)  # its first checkpoint
    done = run_main("ladder", *words, "--sizes", f"{SIZES},{bad}", "--multiples", MULTIPLES)
    assert done.returncode == 1 and "bad/stable: failed with exit code 5" in done.stdout
    assert done.stdout.count("not started, since") == 2
    assert "6 runs; noise around the fit" in done.stdout
    stable = tmp_path / "ladder/48x1/stable"
    assert [event["event"] for event in events_of(stable, "start", "resume")] == ["start", "resume"]


def test_print_writes_the_commands_or_a_slurm_array_with_a_task_per_size(words, run_main, tmp_path):
    line = ["ladder", *words, "--sizes", SIZES, "--multiples", MULTIPLES, "--print"]
    printed = run_main(*line).stdout.splitlines()
    assert len(printed) == 9 and not (tmp_path / "ladder").exists()
    script = run_main(*line, "slurm").stdout
    assert "#SBATCH --array=1-3" in script
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/srun"
    for fails, codes in {"none": [0] * 3, "0.02x": [0, 5, 0], "stable": [5]}.items():
        fake.write_text(f'#!/bin/sh\necho "$@"\ncase "$*" in *run_dir=*{fails}) exit 5;; esac\n')
        fake.chmod(0o755)
        task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "9", "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=task)
        expected = [" ".join(shlex.split(command)) for command in printed[3:6]][: len(codes)]
        assert done.stdout.splitlines() == expected and done.returncode == max(codes)


def test_the_stable_phase_saves_a_third_of_the_tokens(words):
    ladder = planned(words, multiples=(1, 2, 4))
    assert ladder.tokens <= 0.66 * ladder.separate_tokens
    assert [rung.size for rung in ladder.rungs[::3]] == ["48x1", "32x1", "16x1"], "the longest runs start first"
    for rung in ladder.rungs:
        assert rung.tokens == pytest.approx(20 * rung.multiple * rung.parameters, rel=0.01)
        assert rung.parameters == parameters_of(rung.point.config.model)
    model = ladder.rungs[0].point.config.model
    assert (model.d_model, model.n_layers, model.n_heads, model.mlp_hidden) == (48, 1, 3, 128)


def test_what_is_refused(words, run_main, tmp_path):
    for sizes, multiples, message in (
        ("16x1,32x1", (1, 2), "--sizes: 2 sizes cannot be fitted; name 3 or more"),
        (SIZES, (2,), "--multiples: 1 multiple cannot be fitted; name 2 or more"),
        ("16x1,32x1,big", (1, 2), "--sizes: 'big' is no size; write d_model x n_layers"),
        ("16x1,32x1,40x1", (1, 2), "--sizes: the width of 40x1 is not a multiple of 16"),
        ("16x1,32x1,32x1,16x1", (1, 2), "--sizes: 2 sizes"),
        (SIZES, (0.002, 1), "optim.warmup_steps: 2 of the size 16x1 is longer than"),
    ):
        with pytest.raises(ConfigError, match=message):
            planned(words, sizes, multiples)
    for more in (["--multiples", "1,x"], ["--decay", "1"], ["--jobs", "0"], ["--forecast", "1"], ["--sizes", "16x1,32x1"]):
        done = run_main("ladder", *words, "--sizes", SIZES, *more)
        assert done.returncode == 2 and f"error: {more[0]}" in done.stderr, more
    assert not (tmp_path / "ladder").exists()

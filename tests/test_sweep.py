"""sweep: one ordinary run for each choice and seed, resumable; a comparison that says when it cannot tell."""

import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import exit_code, fork
from runs import cut, history, lines_of, trained, wait_for

from olmo_train.__main__ import main
from olmo_train.curves.exports import read_runs
from olmo_train.errors import ConfigError
from olmo_train.predict import sweep as module
from olmo_train.predict.compare import Row, interval, judge
from olmo_train.predict.sweep import plan_sweep, values_of


class Forked:
    """A run as a forked child, which skips the imports."""

    def __init__(self, point, environment):
        point.log.parent.mkdir(parents=True, exist_ok=True)
        self.pid = fork(lambda: main(["train", *point.words]), output=point.log)
        self.deadline = time.monotonic() + 90

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        assert pid or time.monotonic() < self.deadline, f"process {self.pid} is still there"
        return os.waitstatus_to_exitcode(status) if pid else None

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


@pytest.fixture
def forked(monkeypatch):
    started = []

    def start(point, environment):
        started.append(point.run_dir.name)
        return Forked(point, environment)

    monkeypatch.setattr(module, "start", start)
    return started


SMALL = {"model.n_layers": 1, "total_steps": 4, "optim.warmup_steps": 1, "checkpoint.interval_steps": 2}


def test_a_sweep_is_ordinary_runs_with_a_table_and_a_picture(tiny_words, tiny_args, run_main, forked, held_out, tmp_path):
    changes = SMALL | {"optim.peak_lr": "1e-3,1e-1", "data.validation.v.path": held_out}
    words = ["sweep", *tiny_words("sweep", **changes), "--seeds", 2]
    done = run_main(*words)
    assert done.returncode == 0, done.stderr
    names = [f"optim.peak_lr={lr},seed={seed}" for lr in ("1e-3", "1e-1") for seed in (3, 4)]
    assert forked == names and (tmp_path / "sweep/sweep.png").stat().st_size > 5000
    alone = trained(tiny_args("alone", **changes | {"optim.peak_lr": "1e-1", "seed": 4}))
    assert history(tmp_path / "sweep" / names[3]) == history(alone.run_dir)
    losses = [lines_of(tmp_path / "sweep" / name)[-1]["eval/v/CrossEntropyLoss"] for name in names]
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("1e-")]
    assert [row[:3] for row in table] == [
        ["1e-3", "2", f"{sum(losses[:2]) / 2:.4f}"],
        ["1e-1", "2", f"{sum(losses[2:]) / 2:.4f}"],
    ]
    assert "best: optim.peak_lr=" in done.stdout or "cannot tell" in done.stdout
    assert [len(run.seeds) for run in read_runs([tmp_path / "sweep"])] == [2, 2]  # what `curves FOLDER/` draws

    again = run_main(*words)
    assert again.returncode == 0 and forked == names and again.stdout.count("finished before") == 4
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]


def test_a_stopped_run_is_resumed_and_a_failed_one_is_reported(tiny_words, tiny_args, run_main, forked, tmp_path):
    words = tiny_words("sweep", **SMALL | {"optim.peak_lr": "1e-3,2e-3,1e30"})
    one = "optim.peak_lr=1e-3,seed=3"
    cut(tiny_args(f"sweep/{one}", **SMALL | {"optim.peak_lr": 1e-3}), steps=3)
    done = run_main("sweep", *words, "guards.max_skipped=1")
    assert done.returncode == 1
    assert [line["step"] for line in lines_of(tmp_path / "sweep" / one)] == [1, 2, 3, 4]
    failed = next(line for line in done.stdout.splitlines() if "1e30,seed=3: failed" in line)
    assert "failed with exit code 5" in failed
    assert "cannot tell: optim.peak_lr=" in done.stdout and "with one seed; compare with --seeds 3" in done.stdout


def test_a_signal_stops_the_runs_after_saving_and_starts_no_other(tiny_words, tmp_path):
    words = tiny_words("sweep", **SMALL | {"optim.peak_lr": "1e-3,2e-3", "total_steps": 100_000})
    first = tmp_path / "sweep/optim.peak_lr=1e-3,seed=3"

    def sweep() -> int:
        module.start = Forked
        return main(["sweep", *words])

    child = fork(sweep, os.devnull)
    wait_for(first, 2)
    os.kill(child, signal.SIGTERM)
    assert exit_code(child, 60) == 75
    assert (first / "checkpoints").is_dir() and not (tmp_path / "sweep/optim.peak_lr=2e-3,seed=3").exists()


def test_runs_at_the_same_time_have_separate_gpus(tiny_words, monkeypatch):
    started = []

    def start(point, environment):
        started.append(environment.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({0.1 if len(started) == 1 else 1})"])

    monkeypatch.setattr(module, "start", start)
    points = plan_sweep([], tiny_words("out") + ["optim.peak_lr=1e-3,2e-3,3e-3,4e-3"]).points
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert module.train_points(points[:3], 2, print) == [0, 0, 0]
    assert started == ["4", "GPU-7", "4"]  # the third run has the place of the one that ended
    module.train_points(points, 1, print)
    assert started[3:] == ["4,GPU-7"] * 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    module.train_points(points[:2], 2, print)
    assert started[7:] == ["", ""]


def test_print_writes_the_commands_or_a_slurm_array(tiny_words, run_main, tmp_path):
    words = ["sweep", *tiny_words("s w", **{"optim.peak_lr": "1e-3,2e-3"}), "--seeds", 2, "--print"]
    printed = run_main(*words).stdout.splitlines()
    assert len(printed) == 4 and not (tmp_path / "s w").exists()
    assert "optim.peak_lr=2e-3 seed=3" in printed[2] and f"'run_dir={tmp_path}/s w/optim.peak_lr=2e-3,seed=3'" in printed[2]
    script = run_main(*words, "slurm").stdout
    assert "#SBATCH --array=1-4" in script
    fake = tmp_path / "bin"
    fake.mkdir()
    for name, code in {"srun": 75, "scontrol": 0}.items():
        (fake / name).write_text(f'#!/bin/sh\necho {name} "$@"\nexit {code}\n')
        (fake / name).chmod(0o755)
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "9", "PATH": f"{fake}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=task)
    srun, requeue = done.stdout.splitlines()
    assert srun == "srun " + printed[2].replace("'", "") and (requeue, done.returncode) == ("scontrol requeue 9_3", 75)


def test_what_is_swept_and_what_is_refused(tiny_words):
    def planned(*words, seeds=1, **changes):
        return plan_sweep([], [*tiny_words("sweep", **changes), *words], seeds)

    points = planned("optim.peak_lr=1e-3,2e-3", "optim.weight_decay=0,0.1", seeds=3).points
    assert len(points) == 12 and len({point.run_dir for point in points}) == 12
    assert [(p.config.optim.peak_lr, p.config.optim.weight_decay, p.config.seed) for p in points[:4]] == [
        (1e-3, 0.0, 3), (1e-3, 0.0, 4), (1e-3, 0.0, 5), (1e-3, 0.1, 3)]  # fmt: skip
    assert values_of("a=[1,2]") == ["[1,2]"] and values_of("a='1,2'") == ["'1,2'"] and values_of("a=1, 2") == ["1", "2"]
    assert [point.config.seed for point in planned(seed="1,2").points] == [1, 2]
    for words, message in {
        (): "sweep: has no key with several values; write KEY=V1,V2",
        ("optim.peak_lr=1e-3,,2e-3",): "optim.peak_lr: 1e-3,,2e-3 has an empty value, or one twice",
        ("optim.peak_lr=1e-3,1e-3",): "optim.peak_lr: .* or one twice",
        ("optim.peak_lr=1e-3,fast",): "optim.peak_lr: must be a number, got 'fast'",
        ("run_dir=a,b",): "run_dir: is the folder of the whole sweep",
        ("micro_batch_size=1,2", "optim.peak=1,2"): "optim.peak: is not a known key",
    }.items():
        with pytest.raises(ConfigError, match=message):
            planned(*words)
    with pytest.raises(ConfigError, match="--seeds: goes without seed"):
        planned(seed="1,2", seeds=2)


def test_the_best_value_is_named_only_when_the_seeds_separate_it():
    """Student's t with 2 degrees of freedom: 4.303 standard errors."""
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    keys = ("optim.peak_lr",)
    best = Row(("3e-3",), {1: 3.00, 2: 3.10, 3: 3.20})
    far = Row(("1e-2",), {1: 3.50, 2: 3.62, 3: 3.70})  # always about 0.5 above under the same seed
    near = Row(("1e-3",), {1: 3.05, 2: 3.08, 3: 3.25})  # not always above
    assert judge(keys, [far, best]) == "best: optim.peak_lr=3e-3, loss 3.1000 (2.8516 to 3.3484, 95% over 3 seeds)"
    assert judge(keys, [far, best, near]).startswith(
        "cannot tell: optim.peak_lr=3e-3 has the lowest loss, 3.1000, and optim.peak_lr=1e-3"
    )
    assert "with one seed" in judge(keys, [Row(("1",), {1: 3.0}), Row(("2",), {1: 9.0})])
    diverged = Row(("1",), {1: float("nan"), 2: 3.0, 3: 3.0})
    assert judge(keys, [diverged, best, far]).startswith("best: optim.peak_lr=3e-3")
    assert judge(keys, [diverged]) == "cannot tell: no choice has a finite loss"

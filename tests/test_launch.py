"""The launchers, and the text of the first run."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_standard_library_is_gathered_without_tests_and_other_packages():
    names = [name for name, _ in load("gather_text").standard_library()]
    assert "argparse.py" in names and "asyncio/events.py" in names
    assert not [name for name in names if "test" in Path(name).parts or "site-packages" in name]


def test_local_starts_one_process_each_and_gives_the_words_on(tmp_path, tiny_words, read_metrics):
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC": "2", "PYTHONPATH": str(LAUNCH.parent)}
    words = tiny_words("run", total_steps=2)
    out = subprocess.run([LAUNCH / "local.sh", *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert [line["world_size"] for line in read_metrics(tmp_path / "run")] == [2, 2]


@pytest.fixture
def slurm(tmp_path):
    """slurm(seconds): the batch script with stand-ins for Slurm's commands, which note how they were called in `log`.

    The stand-in of srun works for so many seconds, saves on SIGTERM and then exits 1, as torchrun does.
    """
    log = tmp_path / "log"
    worker = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(1))); "
    worker += "print('working', flush=True); time.sleep(float(sys.argv[1]))"
    stand_ins = {
        "scontrol": f'echo "scontrol $*" >> {log}; [ "$1" != show ] || printf "first\\nsecond\\n"',
        "srun": f'echo "srun $*" >> {log}; exec {sys.executable} -c "{worker}" $SECONDS_OF_WORK',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def start(seconds: float) -> subprocess.Popen:
        job = {"SLURM_JOB_NODELIST": "first,second", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
        environment = {**os.environ, **job, "SECONDS_OF_WORK": str(seconds), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        words = ["bash", LAUNCH / "slurm.sbatch", "config.yaml", "total_steps=9"]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)

    start.log = log
    return start


def test_a_slurm_job_starts_one_torchrun_a_machine_and_ends_with_its_code(slurm):
    assert slurm(0).wait(timeout=60) == 0
    (called,) = [line for line in slurm.log.read_text().splitlines() if line.startswith("srun")]
    assert "--nnodes=2 --nproc-per-node=8" in called and "--rdzv-endpoint=first:29500" in called
    assert called.endswith("-m olmo_train train config.yaml total_steps=9")
    assert "requeue" not in slurm.log.read_text()


def test_a_slurm_job_at_its_times_end_lets_the_run_save_and_is_queued_again(slurm):
    job = slurm(60)
    assert job.stdout.readline() == "working\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 1
    assert job.stdout.read() == "saved\n"
    assert "scontrol requeue 7" in slurm.log.read_text()

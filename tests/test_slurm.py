"""The batch script on a real Slurm, with two nodes on this machine. tests/benchmarks/slurm_stops.py tries more ways to stop."""

import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import words_of
from slurm import ENDLESS, Training, cluster, install


@pytest.mark.slow
def test_a_time_limit_and_a_preemption_lose_no_step_on_a_real_slurm(tiny_tokens):
    if why := install():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path is at most 107 bytes long
    try:
        with cluster(folder) as slurm:
            training = Training(slurm, words_of(folder / "run", tiny_tokens, **ENDLESS), time="2", signal="B:TERM@45")
            last, checkpoint = training.stop(steps=1)  # the time limit
            assert last == checkpoint > 0
            slurm.call("scontrol", "update", f"jobid={training.job}", "timelimit=30")
            last, checkpoint = training.stop(slurm.preempt, steps=5)
            assert last == checkpoint
            assert slurm.job(training.job)["Restarts"] >= "2"
    finally:
        shutil.rmtree(folder)

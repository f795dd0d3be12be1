"""End a run on a real Slurm in each way that a cluster ends jobs, and count the steps that are lost:

    python tests/benchmarks/slurm_stops.py FOLDER [--time-limits 10]

The cluster is that of tests/slurm.py: two nodes on this machine. No checkpoint is due, so a run that ends without saving loses
all steps since it was started. FOLDER must not exist, and its name must be short.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import markov_stream, words_of
from slurm import ENDLESS, Cluster, Training, cluster, install


def report(what: str, stop: tuple[int, int]) -> int:
    """Print a stop; the number of steps that it lost."""
    last, checkpoint = stop
    print(f"{what:44} last step {last:5}, resumed after step {checkpoint:5}, lost {last - checkpoint}", flush=True)
    return last - checkpoint


def time_limits(slurm: Cluster, words: list[str], number: int) -> list[int]:
    training = Training(slurm, words, time="2", signal="B:TERM@45")
    lost = [report(f"time limit {i + 1}", training.stop(steps=1)) for i in range(number)]
    slurm.cancel_all()
    return lost


def preemptions(slurm: Cluster, words: list[str]) -> list[int]:
    training = Training(slurm, words)

    def cancel_and_submit() -> None:
        slurm.call("scancel", training.job)
        slurm.wait_for("the job has ended", lambda: slurm.job(training.job)["JobState"] == "CANCELLED" and slurm.nodes_are_idle())
        training.submit(partition="patient")

    ways = {
        "scontrol requeue": lambda: slurm.call("scontrol", "requeue", training.job),
        "scancel --signal=TERM": lambda: slurm.call("scancel", "--signal=TERM", training.job),
        "preempted by an urgent job": slurm.preempt,
        "scancel, then sbatch": cancel_and_submit,
        "preempted, with a minute of grace": slurm.preempt,
    }
    lost = [report(way, training.stop(end)) for way, end in ways.items()]
    slurm.cancel_all()
    return lost


def lost_node(slurm: Cluster, words: list[str]) -> None:
    training = Training(slurm, words)

    def lose() -> None:
        slurm.lose_node()
        time.sleep(5)
        slurm.return_node()

    report("lost node, with a checkpoint every 5 steps", training.stop(lose, seconds=400))
    slurm.cancel_all()


def not_requeued(slurm: Cluster, what: str, words: list[str]) -> None:
    """Print the exit code and number of restarts of a job that ends by itself, a while after its end."""
    job = slurm.submit(*words, time="60")
    slurm.wait_for("the job ends", lambda: slurm.job(job)["JobState"] in ("COMPLETED", "FAILED"))
    time.sleep(20)  # a requeued one would have started again
    ended = slurm.job(job)
    (*_, line) = (line for line in slurm.log(job).splitlines() if not line.startswith(("srun:", "slurmstepd")))
    print(f"{what:44} {ended['JobState']}, exit code {ended['ExitCode']}, {ended['Restarts']} restarts: {line}", flush=True)


def array(slurm: Cluster, words: list[str]) -> None:
    """Print how the two tasks of an array end, and their run_dirs."""
    job = slurm.submit(*words, f"run_dir={slurm.folder}/seed-%a", "seed=%a", array="1-2", nodes="1")
    for task in ("1", "2"):
        slurm.wait_for(f"task {task} ends", lambda task=task: slurm.job(f"{job}_{task}")["JobState"] in ("COMPLETED", "FAILED"))
        ended, run_dir = slurm.job(f"{job}_{task}"), slurm.folder / f"seed-{task}"
        kept = max(file.name for file in (run_dir / "checkpoints").glob("step-*"))
        print(f"{f'task {task} of an array':44} {ended['JobState']}, {run_dir.name}/checkpoints/{kept}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time-limits", type=int, default=10)
    options = parser.parse_args()
    if why := install():
        sys.exit(f"error: Slurm: {why}")
    with cluster(options.folder.absolute()) as slurm:
        tokens = slurm.folder / "tokens.npy"
        tokens.write_bytes(markov_stream(40_000).tobytes())
        endless = words_of(slurm.folder / "run", tokens, **ENDLESS)
        short = words_of(slurm.folder / "short", tokens, total_steps=12)
        print(slurm.call("sinfo", "--version"), flush=True)
        not_requeued(slurm, "a run that finishes", short)
        not_requeued(slurm, "a configuration error", [*short, "optim.peak_rl=1"])
        not_requeued(slurm, "data that is missing", [*short, f"run_dir={slurm.folder}/other", "data.sources.a.path=missing.npy"])
        array(slurm, short)
        lost = preemptions(slurm, endless)
        print(f"{lost.count(0)} of {len(lost)} preemptions lost no step", flush=True)
        lost_node(slurm, [*endless, f"run_dir={slurm.folder}/node", "checkpoint.interval_steps=5"])
        lost = time_limits(slurm, endless, options.time_limits)
        print(f"{lost.count(0)} of {len(lost)} time limits lost no step", flush=True)


if __name__ == "__main__":
    main()

"""A rank that is stopped, killed or failed ends the run on all ranks, which name it; a healthy run is left alone."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import environments, exit_code, fork, on_ranks
from runs import events_of, lines_of, wait_for

from olmo_train import train as module
from olmo_train.__main__ import main
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.data.loader import Loader
from olmo_train.data.mixture import Mixture
from olmo_train.errors import CheckpointError, DataError, PeerError, UserError
from olmo_train.guards.watchdog import group_timeout
from olmo_train.log.interval import slow_ranks
from olmo_train.parallel.world import explain_lost_peers
from olmo_train.run.run import Run

HANG_SECONDS = 2


@pytest.fixture
def running(tiny_words, tmp_path):
    """running(prepare=..., **changes): [pid of each of two ranks] of a long run that has logged some steps, and its run_dir.
    `prepare(rank)` is called in each process before."""
    pids = []

    def start(prepare=lambda rank: None, wait=True, **changes):
        words = tiny_words("run", **{"total_steps": 100_000, "guards.hang_seconds": HANG_SECONDS, **changes})
        for rank, environment in enumerate(environments(2)):
            child = lambda rank=rank: prepare(rank) or main(["train", *words])  # noqa: E731
            pids.append(fork(child, tmp_path / f"{rank}.stderr", **environment))
        if wait:
            wait_for(tmp_path / "run", 6)
        return pids, tmp_path / "run"

    yield start
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def last_line(tmp_path, rank):
    lines = (tmp_path / f"{rank}.stderr").read_text().splitlines()
    return lines[-1] if lines else ""


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_other_and_ends_both(running, tmp_path, stopped):
    pids, run_dir = running()
    os.kill(pids[stopped], signal.SIGSTOP)
    assert exit_code(pids[1 - stopped], HANG_SECONDS + 15) == 6
    line = last_line(tmp_path, 1 - stopped)
    assert line.startswith("error: guards.hang_seconds: no progress for ")
    assert f"rank {stopped}: its process is stopped, last seen after step" in line and "last batch" in line
    hang = run_dir / "forensics" / "hang"
    assert "olmo_train/train.py" in (hang / f"rank-{1 - stopped:04d}.txt").read_text()
    assert f"rank {stopped}: its process is stopped" in (hang / f"rank-{stopped:04d}.txt").read_text()
    os.kill(pids[stopped], signal.SIGCONT)
    assert exit_code(pids[stopped], HANG_SECONDS + 15) == 6
    assert last_line(tmp_path, 1) == "" or stopped == 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_other(running, tmp_path, killed):
    pids, run_dir = running()
    os.kill(pids[killed], signal.SIGKILL)
    assert exit_code(pids[1 - killed], 30) == 6
    line = last_line(tmp_path, 1 - killed)
    assert line.startswith(f"error: peers: rank {killed} was killed, or died without a word, after step "), line


def test_a_rank_that_hangs_by_itself_is_named_by_its_peer(running, tmp_path):
    def prepare(rank):
        real = Run.next_batch

        def next_batch(self, loader):
            batch = real(self, loader)
            if rank == 1 and self.done == 8:
                self.watchdog.heartbeat = lambda *about: None
                time.sleep(60)
            return batch

        Run.next_batch = next_batch

    pids, run_dir = running(prepare)
    codes = [exit_code(pid, HANG_SECONDS + 15) for pid in pids]
    assert codes == [6, 6]
    assert "no progress" in last_line(tmp_path, 0) and last_line(tmp_path, 1) == ""
    assert "rank 1: keeps the others waiting in next_batch" in last_line(tmp_path, 0)
    stacks = [(run_dir / "forensics" / "hang" / f"rank-{rank:04d}.txt").read_text() for rank in (0, 1)]
    assert "in agree_to_stop" in stacks[0] and "in next_batch" in stacks[1]


def test_the_reason_of_a_rank_that_fails_alone_reaches_the_user(running, tmp_path):
    def prepare(rank):
        real = Run.next_batch

        def next_batch(self, loader):
            if rank == 1 and self.done == 3:
                raise DataError("part.bin", "token 5 has id 700")
            return real(self, loader)

        Run.next_batch = next_batch

    pids, _ = running(prepare, wait=False)
    assert [exit_code(pid) for pid in pids] == [6, 3]
    assert last_line(tmp_path, 0) == "error: peers: rank 1 failed: part.bin: token 5 has id 700; run the same command again"
    assert last_line(tmp_path, 1) == ""


def test_an_error_of_one_rank_before_the_run_is_raised_on_all():
    def run(world):
        def fails_on_one():
            if world.rank == 1:
                raise DataError("part.bin", "is missing")
            return 1

        try:
            return world.together(fails_on_one)
        except DataError as problem:
            return str(problem)

    assert on_ranks(2, run) == ["part.bin: on rank 1: is missing"] * 2
    assert on_ranks(2, lambda world: world.together(lambda: world.rank)) == [0, 1]


HELD_OUT = (Mixture, "open_validation", DataError("v.npy", "cannot be opened"), 3, "v.npy: on rank 1: cannot be opened")
STATE = (folders, "read_state", CheckpointError("step-0000002", "is gone"), 4, "step-0000002: on rank 1: is gone")
HEARTBEATS = (
    Path,
    "mkdir",
    OSError(30, "Read-only file system"),
    2,
    "on rank 1: {} cannot be written: [Errno 30] Read-only file",
)


@pytest.mark.parametrize("owner, name, problem, code, told", [HELD_OUT, STATE, HEARTBEATS])
def test_what_one_rank_alone_cannot_open_ends_all_ranks_with_its_reason(tiny_args, held_out, owner, name, problem, code, told):
    config = tiny_args("run", total_steps=2, **{"data.validation.v.path": held_out})
    list(module.train(config))
    config = tiny_args("run", total_steps=4, **{"data.validation.v.path": held_out})
    real = getattr(owner, name)

    def fails(*args, **options):
        if owner is Path and ".heartbeats" not in args[0].parts:
            return real(*args, **options)
        raise problem

    def run(world):
        if world.rank == 1:
            setattr(owner, name, fails)
        try:
            list(module.train(config, world))
        except UserError as error:
            return [error.exit_code, str(error)]

    first, second = on_ranks(2, run)
    assert first == second and first[0] == code and told.format(config.run_dir) in first[1], first


GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/"
LOST = [
    (GLOO + "pair.cc:537] Read error [10.0.0.2]:372: Connection reset by peer. Check the logs of the remote worker. GLHF!",
     "Read error [10.0.0.2]:372: Connection reset by peer"),
    (GLOO + "unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete",
     "Timed out waiting 1000ms for recv operation to complete"),
    ("Application timeout caused pair closure", "Application timeout caused pair closure"),
    ("[1] Connection closed by peer [fe80::1]:4. GLHF!", "[1] Connection closed by peer [fe80::1]:4"),
]  # fmt: skip


@pytest.mark.parametrize("text, reason", LOST)
def test_a_lost_peer_is_one_sentence_without_files_of_torch(text, reason):
    with pytest.raises(PeerError) as lost, explain_lost_peers():
        raise RuntimeError(text)
    assert str(lost.value) == f"peers: another process of the run is gone: {reason}; run the same command again"
    nccl = "NCCL error in: /pytorch/csrc/ProcessGroupNCCL.cpp:21, unhandled system error (run with NCCL_DEBUG=INFO)\nLast error:"
    with (
        pytest.raises(PeerError, match="gone: NCCL error in: unhandled system error .run with NCCL_DEBUG=INFO.; run"),
        explain_lost_peers(),
    ):
        raise torch.distributed.DistBackendError(nccl)
    with pytest.raises(RuntimeError, match="shapes differ"), explain_lost_peers():
        raise RuntimeError("shapes differ")


def test_the_watchdog_speaks_before_any_process_group_does(tiny_args):
    """Also in its patience for saves and the first step, and in the groups of a mesh with replicas."""
    assert group_timeout(600) == group_timeout(1) == 1800 + 120 and group_timeout(3600) == 3720
    assert group_timeout(0) > 300 * 86400  # 0 is never

    def timeouts(*groups):
        groups = (torch.distributed.group.WORLD, *groups)
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    run = module.train(tiny_args("run", **{"guards.hang_seconds": 5000}))
    next(run)
    assert timeouts() == [5120.0]
    run.close()

    def all_timeouts(world):
        return timeouts(world.background_group, world.control_group, *world.mesh.get_all_groups())

    assert on_ranks(4, all_timeouts, replicas=2, timeout_seconds=5120) == [[5120.0] * 5] * 4


@pytest.mark.parametrize("late", [0.3, 0])  # seconds, several times what a step of this model takes anywhere
def test_a_rank_that_needs_three_times_the_median_is_told_and_an_equal_one_is_not(tiny_args, late):
    config = tiny_args("run", total_steps=12, **{"log.interval_steps": 4})

    def train(world):
        real = Loader.get

        def get(self, give_up):
            time.sleep(late if world.rank == 1 else 0)
            return real(self, give_up)

        Loader.get = get
        list(module.train(config, world))

    on_ranks(2, train)
    told = events_of(config.run_dir, "slow")
    assert [event["rank"] for event in told] == ([1] if late else [])  # once in ten lines
    assert not late or told[0]["own_seconds"] > late > told[0]["median_seconds"]


def test_slow_is_three_times_the_median_and_no_mere_noise():
    assert slow_ranks([1.0, 1.0, 3.1, 1.2]) == [2]
    assert slow_ranks([1.0, 2.9]) == slow_ranks([0.001, 0.009]) == slow_ranks([2.0, 2.0, 2.0]) == []
    assert slow_ranks([1.0, 3.1]) == [1] and slow_ranks([4.0, 1.0]) == [0]


def test_a_healthy_run_is_left_alone_also_while_it_saves_and_evaluates(running, tmp_path, tiny_tokens):
    """With stages that each take longer than hang_seconds allows a step."""

    def prepare(rank):
        for owner, name in ((Checkpointer, "save"), (module, "build"), (Checkpointer, "wait")):
            slow(owner, name)

    pids, run_dir = running(prepare, wait=False, total_steps=4, **{"guards.hang_seconds": 0.6, "checkpoint.interval_steps": 4})
    assert [exit_code(pid) for pid in pids] == [0, 0]
    assert not (run_dir / "forensics").exists() and not (run_dir / ".heartbeats").exists()
    assert [line["step"] for line in lines_of(run_dir)] == [1, 2, 3, 4]


def slow(owner, name):
    real = getattr(owner, name)

    def slowly(*args):
        time.sleep(1.0)
        return real(*args)

    setattr(owner, name, slowly)

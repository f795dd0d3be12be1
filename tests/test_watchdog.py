"""A rank that is stopped, killed or failed ends the run on all ranks, which name it; a healthy run is left alone."""

import contextlib
import ctypes
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import environments, exit_code, fork, on_ranks
from runs import events_of, first_quick, lines_of, wait_for

from olmo_train import train as module
from olmo_train.__main__ import main
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.data.loader import Loader
from olmo_train.data.mixture import Mixture
from olmo_train.errors import CheckpointError, ConfigError, DataError, PeerError, UserError
from olmo_train.guards import watcher
from olmo_train.guards.heartbeats import HANG, Heartbeats
from olmo_train.guards.watchdog import PATIENCE, SEARCH, Watchdog, group_timeout
from olmo_train.log.interval import slow_ranks
from olmo_train.parallel.world import LEAVE_SECONDS, explain_lost_peers, join_world
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


@pytest.mark.parametrize("stopped", first_quick([0, 1]))
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


@pytest.mark.parametrize("killed", first_quick([0, 1]))
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


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")
FAILURES = {  # error: exit code, what is printed
    "memory": (
        OUT_OF_MEMORY,
        1,
        "micro_batch_size: CUDA out of memory. Tried to allocate 2.00 GiB; use a micro_batch_size below 4",
    ),
    "data": (DataError("part.bin", "token 5 has id 700"), 3, "part.bin: token 5 has id 700"),
    "bug": (RuntimeError("boom"), 1, "RuntimeError: boom"),
}


def as_nccl_leaves():
    """NCCL's destroy_process_group waits until all ranks have called it."""
    torch.distributed.destroy_process_group = lambda: time.sleep(600)


def at_step(step, failing, act):
    """On the rank `failing`, call `act` in place of the batch after this step."""

    def prepare(rank):
        as_nccl_leaves()
        real = Run.next_batch
        Run.next_batch = lambda run, loader: act() if rank == failing and run.done == step else real(run, loader)

    return prepare


def throw(problem):
    raise problem


@pytest.mark.parametrize("failing", first_quick([0, 1]))
@pytest.mark.parametrize("problem, code, text", FAILURES.values(), ids=FAILURES)
def test_an_error_of_one_rank_ends_all_within_10_seconds(running, tmp_path, failing, problem, code, text):
    pids, run_dir = running(at_step(3, failing, lambda: throw(problem)), wait=False, **{"guards.hang_seconds": 600})
    wait_for(run_dir, 3)
    deadline = time.monotonic() + 10
    codes = [exit_code(pid, deadline - time.monotonic()) for pid in pids]
    assert codes[failing] == code and codes[1 - failing] == 6
    if failing == 0:
        assert text in last_line(tmp_path, 0) and last_line(tmp_path, 1) == ""
    else:
        assert last_line(tmp_path, 0).startswith(f"error: peers: rank 1 failed: {text}")
        # torch adds the rank to a traceback, once for each group that the process has joined
        assert re.sub(r"^(\[rank\d\]: )+", "", last_line(tmp_path, 1)) in ("", text)


@pytest.mark.parametrize("failing", first_quick([0, 1]))
def test_an_error_in_the_callers_loop_on_one_rank_ends_all_within_10_seconds(tiny_args, tmp_path, failing):
    config = tiny_args(total_steps=100_000)

    def run(rank):
        as_nccl_leaves()
        for stats in module.train(config):
            if rank == failing and stats.step == 4:
                raise RuntimeError("the caller's own")

    ranks = [
        fork(lambda rank=rank: run(rank), tmp_path / f"{rank}.stderr", **environment)
        for rank, environment in enumerate(environments(2))
    ]
    wait_for(config.run_dir, 3)
    deadline = time.monotonic() + 10
    assert [exit_code(pid, deadline - time.monotonic()) for pid in ranks] == [1, 1]
    assert last_line(tmp_path, failing).startswith("RuntimeError: the caller's own")
    assert f"PeerError: peers: rank {failing} ended its loop over train()" in last_line(tmp_path, 1 - failing)


def hold_the_lock():
    """Block in C with Python's lock held, as the launch of a GPU kernel does while its queue is full."""
    mutex, lock = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock
    lock(mutex)  # zeros are an open one
    lock(mutex)  # a read or a sleep would end at a signal, and Python would run its handler


@pytest.mark.parametrize("blocked", first_quick([0, 1]))
def test_a_rank_that_blocks_with_the_lock_held_is_named_and_ends(running, tmp_path, blocked):
    pids, run_dir = running(at_step(8, blocked, hold_the_lock))
    assert [exit_code(pid, HANG_SECONDS + 20) for pid in pids] == [6, 6]
    assert "no progress" in last_line(tmp_path, 0) and last_line(tmp_path, 1) == ""
    assert f"rank {blocked}: keeps the others waiting in hold_the_lock" in last_line(tmp_path, 0)
    assert f"rank {1 - blocked}:" not in last_line(tmp_path, 0)
    assert "in hold_the_lock" in (run_dir / "forensics" / "hang" / f"rank-{blocked:04d}.txt").read_text()


def test_a_rank_that_blocks_with_the_lock_held_as_it_waits_for_another_is_not_blamed(running, tmp_path):
    def prepare(rank):
        if rank == 0:
            real = Run.agree_to_stop
            Run.agree_to_stop = lambda run: hold_the_lock() if run.done == 8 else real(run)
        else:
            at_step(8, 1, lambda: time.sleep(60))(rank)

    pids, run_dir = running(prepare)
    assert [exit_code(pid, HANG_SECONDS + 20) for pid in pids] == [6, 6]
    line = last_line(tmp_path, 0)
    assert "rank 1: keeps the others waiting in <lambda>" in line and "rank 0:" not in line


def test_a_rank_that_blocks_in_a_collective_ends_when_another_fails(running, tmp_path):
    """As in one of NCCL, which does not notice that another process is gone."""

    def prepare(rank):
        at_step(3, 1, lambda: throw(DataError("part.bin", "is gone")))(rank)
        if rank == 0:
            at_step(3, 0, hold_the_lock)(rank)

    pids, run_dir = running(prepare, wait=False, **{"guards.hang_seconds": 600})
    wait_for(run_dir, 3)
    deadline = time.monotonic() + 10
    assert [exit_code(pid, deadline - time.monotonic()) for pid in pids] == [6, 3]
    assert last_line(tmp_path, 0) == "error: peers: rank 1 failed: part.bin: is gone; run the same command again"


def test_a_rank_whose_hanging_peer_was_ended_first_still_reports_the_hang(tmp_path):
    """Each watcher ends its own rank: the connection may be lost before this one has reported."""
    dead = fork(lambda: 0)
    assert exit_code(dead) == 0
    folder = tmp_path / "beats"

    def lose_the_connection():
        dog = Watchdog(HANG_SECONDS, tmp_path, folder, rank=0, size=2)
        Heartbeats(folder, 1, 2, dead)
        (folder / HANG).touch()
        with contextlib.suppress(PeerError), dog.exit_report():
            raise PeerError("peers", "connection closed")
        dog.close()

    assert exit_code(fork(lose_the_connection, tmp_path / "0.stderr")) == PeerError.exit_code
    assert "no progress" in last_line(tmp_path, 0) and f"pid {dead} " in last_line(tmp_path, 0)


def test_a_rank_that_waits_for_a_failed_one_says_why_it_failed(tmp_path):
    def wait():
        dog = Watchdog(HANG_SECONDS, tmp_path, tmp_path / "beats", rank=0, size=2)
        Heartbeats(tmp_path / "beats", 1, 2, os.getpid()).note("error", "part.bin: is gone")
        dog.heartbeat(7)
        time.sleep(60)

    assert exit_code(fork(wait, tmp_path / "0.stderr"), HANG_SECONDS + 15) == PeerError.exit_code
    assert last_line(tmp_path, 0) == "error: peers: rank 1 failed: part.bin: is gone; run the same command again"


def test_the_watchers_process_is_started_again_and_ends_with_the_watchdog(tmp_path, caplog):
    dog = Watchdog(600, tmp_path, tmp_path / "beats", rank=0)
    first = dog._watcher
    first.kill()
    first.wait()
    dog.heartbeat(1)
    second = dog._watcher
    assert second.pid != first.pid and second.poll() is None and "starting it again" in caplog.text
    dog.close()
    assert second.returncode is not None and not (tmp_path / "beats").exists()
    with contextlib.suppress(ProcessLookupError):
        os.kill(second.pid, 0)
        raise AssertionError("the watcher is still there")


def test_the_first_rank_without_a_gpu_says_so(monkeypatch):
    """Rank 0 has one, and waits in init_process_group."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in (2, 3):
        for name, value in (environments(4)[local_rank] | {"LOCAL_RANK": str(local_rank)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="this machine shows 2; start 2 processes") as error, join_world():
            pass
        assert error.value.speaks == (local_rank == 2)


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
    "on rank 1: {} cannot be written: Read-only file",
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


GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"  # the same in torch 2.11 and 2.13
CRASH = (
    " This is typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an error. GLHF!"
)
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/"
DETAILS = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\nLast error:\n"
NETWORK, BACKEND, STORE = (getattr(torch.distributed, f"Dist{kind}Error") for kind in ("Network", "Backend", "Store"))
LOST = [
    (RuntimeError, GLOO + "pair.cc:553] Connection closed by peer [127.0.0.1]:49076." + CRASH,
     "Connection closed by peer [127.0.0.1]:49076"),
    (RuntimeError, GLOO + "pair.cc:537] Read error [10.0.0.2]:372: Connection reset by peer." + CRASH,
     "Read error [10.0.0.2]:372: Connection reset by peer"),
    (RuntimeError, GLOO + "unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete",
     "Timed out waiting 1000ms for recv operation to complete"),
    (RuntimeError, "Application timeout caused pair closure", "Application timeout caused pair closure"),
    (RuntimeError, "[1] Connection closed by peer [fe80::1]:4." + CRASH, "[1] Connection closed by peer [fe80::1]:4"),
    (RuntimeError, "Gloo connectFullMesh failed with " + GLOO + "pair.cc:144] no error",
     "Gloo connectFullMesh failed with no error"),
    (BACKEND, NCCL + "ProcessGroupNCCL.cpp:21, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL 2.28\n",
     "NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL 2.28"),
    (BACKEND, NCCL + "NCCLUtils.cpp:86, remote process exited or there was a network error, NCCL version 2.28.9\n" + DETAILS,
     "NCCL error: remote process exited or there was a network error, NCCL version 2.28.9"),
    (NETWORK, "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
     "Failed to recv, got 0 bytes"),
    (STORE, "wait timeout after 600000ms, keys: /default_pg/0//cuda//0",
     "wait timeout after 600000ms, keys: /default_pg/0//cuda//0"),
]  # fmt: skip


@pytest.mark.parametrize("kind, text, reason", LOST)
def test_a_lost_peer_is_one_sentence_without_files_of_torch(kind, text, reason):
    with pytest.raises(PeerError) as lost, explain_lost_peers():
        raise kind(text)
    assert str(lost.value) == f"peers: another process of the run is gone: {reason}; run the same command again"
    with pytest.raises(RuntimeError, match="shapes differ"), explain_lost_peers():
        raise RuntimeError("shapes differ")


def test_the_watchdog_speaks_before_any_process_group_does(tiny_args, monkeypatch):
    """Also in its patience for saves and the first step, and in the groups of a mesh with replicas."""
    assert group_timeout(600) == group_timeout(1) == 1800 + 120 and group_timeout(3600) == 3720
    assert group_timeout(0) > 300 * 86400  # 0 is never
    for seconds in (1, 600, 3600):
        last_report = max(seconds, PATIENCE) + 2 * watcher.TICK + watcher.GRACE + SEARCH
        assert seconds < last_report < group_timeout(seconds)
    assert LEAVE_SECONDS < watcher.NOTICE and watcher.NOTICE + 2 * watcher.TICK < 10
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", raising=False)

    def timeouts(world=None):
        """Those of all groups that torch knows, and of NCCL's monitor, which aborts a process whose launch blocks."""
        groups = torch.distributed.distributed_c10d._world.pg_map
        found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        return [*found, float(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])]

    run = module.train(tiny_args("run", **{"guards.hang_seconds": 5000}))
    next(run)
    assert set(timeouts()) == {5120.0, 5240.0} and len(timeouts()) >= 4
    run.close()
    del os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]
    for found in on_ranks(4, timeouts, replicas=2, timeout_seconds=5120):
        assert set(found) == {5120.0, 5240.0} and len(found) >= 6


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

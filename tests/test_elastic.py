"""Restarts by torchrun itself: after a process was killed, and when a machine leaves or returns. With gloo on this machine."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import environments, exit_code, fork
from runs import LOSS, events_of, history, trained, trained_on

from olmo_train.checkpoint.folders import committed
from olmo_train.parallel.world import join_world

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, time
from olmo_train.__main__ import main
from olmo_train.data.loader import Loader
real = Loader.get
def get(self, give_up):
    time.sleep(float(open("pace").read()))
    return real(self, give_up)
Loader.get = get
sys.exit(main(["train", *sys.argv[1:]]))
"""


class Torchruns:
    """Runs in a folder, each started by a torchrun."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []
        (folder / "script.py").write_text(SCRIPT)

    def __call__(self, *options: str, words: list[str], **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=3", *options, "script.py", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        with open(self.folder / f"stderr-{len(self.started)}", "w") as errors:
            self.started.append(subprocess.Popen(command, cwd=self.folder, env=environment, stderr=errors))
        return self.started[-1]

    def errors(self) -> str:
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(self.folder.glob("stderr-*")))

    def set_pace(self, seconds: float) -> None:
        """How much longer each step takes from now on."""
        (self.folder / "new").write_text(str(seconds))
        (self.folder / "new").rename(self.folder / "pace")

    def wait_until(self, is_so, seconds: float = 240) -> None:
        """Fails at once when a torchrun has ended that kill() has not ended."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert not [run for run in self.started if run.returncode is None and run.poll() is not None], self.errors()
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.05)


@pytest.fixture
def torchrun(tmp_path):
    runs = Torchruns(tmp_path)
    yield runs
    for run in runs.started:
        kill(run)


def processes_below(pid: int) -> list[int]:
    children = [int(word) for word in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return [*children, *(below for child in children for below in processes_below(child))]


def kill(launcher: subprocess.Popen) -> None:
    """Kill a launcher and all of its processes, as when a machine loses power."""
    for pid in (launcher.pid, *processes_below(launcher.pid)) if launcher.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    launcher.wait()


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The processes of the run, without those that watch them."""
    return [pid for pid in processes_below(launcher.pid) if b"script.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def steps(run_dir: Path) -> int:
    """How many steps a run has logged."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def newest_files(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / f"step-{max(committed(run_dir)):07d}"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_processes_that_are_restarted_do_not_read_the_addresses_of_those_before(tmp_path):
    """torchrun keeps its store when it starts the processes again."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def train(is_killed: bool) -> int:
        with join_world(timeout_seconds=20) as world:
            total = int(world.sum(torch.tensor(world.rank + 1)))
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
        return total

    for is_killed, code in ((True, -signal.SIGKILL), (False, 3), (False, 3)):
        places = [environment | place for environment in environments(2)]
        children = [fork(lambda is_killed=is_killed: train(is_killed), tmp_path / "stderr", **each) for each in places]
        assert [exit_code(child) for child in children] == [code, code], (tmp_path / "stderr").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_run_after_a_process_was_killed_and_it_ends_with_the_same_weights(
    rank, torchrun, tiny_words, tiny_args, tmp_path
):
    settings = {"total_steps": 60, "checkpoint.interval_steps": 10}
    torchrun.set_pace(0.02)
    run = torchrun("--standalone", "--nproc-per-node=2", words=tiny_words("run", **settings))
    torchrun.wait_until(lambda: steps(tmp_path / "run") >= 25)
    os.kill(ranks_of(run)[rank], signal.SIGKILL)
    assert run.wait(timeout=240) == 0, torchrun.errors()
    (resumed,) = events_of(tmp_path / "run", "resume")
    assert resumed["step"] >= 20
    trained_on(2, tiny_args("uninterrupted", **settings))
    assert history(tmp_path / "run") == history(tmp_path / "uninterrupted")
    assert newest_files(tmp_path / "run") == newest_files(tmp_path / "uninterrupted") != {}


@pytest.mark.slow
def test_a_run_goes_on_when_a_machine_leaves_and_when_it_returns(torchrun, tiny_words, tiny_args, tmp_path):
    settings = {"total_steps": 60, "checkpoint.interval_steps": 10}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    quick = "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=6"
    options = ["--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=1"]
    words = tiny_words("run", **settings)

    def machine(is_host: int) -> subprocess.Popen:
        """Without is_host the first launcher that binds the port would hold the list of machines, as all are on this one."""
        conf = f"--rdzv-conf={quick},is_host={is_host}"
        return torchrun(*options, conf, words=words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def wait_for_resume(number: int) -> None:
        torchrun.wait_until(lambda: len(events_of(tmp_path / "run", "resume")) == number)

    torchrun.set_pace(0.1)
    stays, leaves = machine(is_host=1), machine(is_host=0)
    torchrun.wait_until(lambda: steps(tmp_path / "run") >= 15)
    torchrun.set_pace(1)
    kill(leaves)
    wait_for_resume(1)
    returns = machine(is_host=0)
    wait_for_resume(2)
    torchrun.set_pace(0)
    codes = [launcher.wait(timeout=240) for launcher in (stays, returns)]
    assert codes == [0, 0], torchrun.errors()
    assert [event["world_size"] for event in events_of(tmp_path / "run", "start", "resume")] == [2, 1, 2]
    (saved,) = events_of(tmp_path / "run", "signal")  # torchrun stops the process that stayed, which saves
    assert events_of(tmp_path / "run", "resume")[1]["step"] == saved["step"]
    trained(tiny_args("uninterrupted", **settings))
    pairs = zip(history(tmp_path / "run", "step", LOSS), history(tmp_path / "uninterrupted", "step", LOSS), strict=True)
    assert all(step == other and math.isclose(loss, same, rel_tol=1e-6) for (step, loss), (other, same) in pairs)
    for name in ("sample_hash", "throughput/total_tokens"):
        assert history(tmp_path / "run", name) == history(tmp_path / "uninterrupted", name)

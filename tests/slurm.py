"""A real Slurm on this machine, to test launch/slurm.sbatch: a controller and two nodes, which share its cores.

    with cluster(folder) as slurm:              everything is written below folder, which must have a short name
        job = slurm.submit(*words, time="2")    launch/slurm.sbatch on both nodes
        slurm.wait_for("it runs", lambda: slurm.job(job)["JobState"] == "RUNNING")

The GPUs of the nodes are device files without a GPU behind them. A queue `urgent` preempts the jobs of the default queue at once,
and those of `patient` after a minute.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")  # munge authenticates Slurm's daemons
ENDLESS = {"total_steps": 100_000, "checkpoint.interval_steps": 100_000}  # a run that ends, and saves, only when it is stopped
NODES = (socket.gethostname(), f"{socket.gethostname()}-2")  # the first is the host of torchrun's rendezvous: it must resolve
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=20
KillWait=30
ReturnToService=2
MailProg=/bin/true
JobRequeue=1
GresTypes=gpu
PartitionName=DEFAULT Nodes={host},{host}-2 MaxTime=INFINITE State=UP
PartitionName=normal Default=YES PriorityTier=1
PartitionName=patient PriorityTier=1 GraceTime=60
PartitionName=urgent PriorityTier=2
"""  # cred_expire is the time after which a requeued job starts again, by default two minutes
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} RealMemory=1000 Gres=gpu:1\n"


def install() -> str:
    """Install Slurm from the distribution's packages where it is missing; why it cannot be, or an empty text."""
    if all(map(shutil.which, PROGRAMS)):
        return ""
    if not shutil.which("apt-get") or os.geteuid():
        return "Slurm is not installed, and can be only by root, with apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run(["apt-get", "-qq", *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"apt-get cannot install slurm-wlm and munge: {' '.join(done.stderr.split())[:300]}"
    return ""


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self, *words: str) -> None:
        """Start a daemon in the foreground."""
        name = words[-1] if words[0] == "slurmd" else words[0]
        log = open(self.folder / f"{name}.out", "a")  # noqa: SIM115
        self.daemons[name] = subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def call(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True)
        assert not done.returncode, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: object, **options: str) -> str:
        """The number of a job that runs launch/slurm.sbatch with these words; `options` are sbatch's."""
        options = {"nodes": "2", "gpus-per-node": "1", "cpus-per-task": "1", "output": self.folder / "%A.log"} | options
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return self.call("sbatch", "--parsable", *flags, str(REPOSITORY / "launch/slurm.sbatch"), *map(str, words))

    def job(self, job: str) -> dict[str, str]:
        """The fields of a job, such as JobState, Restarts and ExitCode."""
        return dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", "-o", job).split() if "=" in word)

    def log(self, job: str) -> str:
        file = self.folder / f"{job}.log"
        return file.read_text() if file.exists() else ""

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(f"{file}:\n{file.read_text()[-3000:]}" for file in self.folder.glob("[0-9]*.log"))
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{logs}"
            time.sleep(0.2)

    def nodes_are_idle(self) -> bool:
        shown = subprocess.run(
            ["sinfo", "-h", "-p", "normal", "-o", "%T %D"], env=self.environment, capture_output=True, text=True
        )
        return shown.stdout.split() == ["idle", str(len(NODES))]

    def preempt(self) -> None:
        """Submit a short job that takes both nodes from the jobs of other queues."""
        self.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")

    def lose_node(self) -> None:
        """The second node vanishes: its slurmd and all its processes are killed."""
        daemon = self.daemons.pop(NODES[1])
        lost = {daemon.pid}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                variables = (process / "environ").read_bytes().split(b"\0")
                names = {f"SLURM_CONF={self.environment['SLURM_CONF']}", f"SLURMD_NODENAME={NODES[1]}"}
                if names <= {os.fsdecode(variable) for variable in variables}:
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    lost |= {int(process.name), parent}  # the parent of a task is Slurm's slurmstepd
        for process in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        daemon.wait()

    def return_node(self) -> None:
        self.start("slurmd", "-D", "-N", NODES[1])

    def cancel_all(self) -> None:
        self.call("scancel", "--state=PENDING", "--user", getpass.getuser())
        self.call("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
        self.wait_for("all jobs have ended", lambda: not self.call("squeue", "--noheader"), 90)


class Training:
    """A job that trains, possibly in several attempts. Its log has a line for each start and each step."""

    def __init__(self, slurm: Cluster, words: list[str], **options: str):
        self.slurm, self.words, self.jobs = slurm, words, []
        self.submit(**options)

    def submit(self, **options: str) -> None:
        self.job = self.slurm.submit(*self.words, **{"time": "60"} | options)
        self.jobs.append(self.job)

    def attempts(self) -> list[tuple[int, list[int]]]:
        """For each start of the run, the step of its checkpoint, 0 without one, and the steps that it made."""
        log = "".join(map(self.slurm.log, self.jobs))
        _, *parts = re.split(r"^\S+ (?:starts|resumes from \S+/step-(\d+)):", log, flags=re.MULTILINE)
        steps = [[int(step) for step in re.findall(r"^step +(\d+)/", part, re.MULTILINE)] for part in parts[1::2]]
        return list(zip((int(step or 0) for step in parts[::2]), steps, strict=True))

    def stop(self, end: Callable[[], object] = lambda: None, steps: int = 10, seconds: float = 240) -> tuple[int, int]:
        """Train for some steps, call `end`, and wait until the run has resumed: the last step before, and the checkpoint's."""
        self.slurm.wait_for(f"{steps} steps", lambda: len(self.attempts()[-1:]) and len(self.attempts()[-1][1]) >= steps, seconds)
        before = len(self.attempts())
        end()
        self.slurm.wait_for("the run resumes", lambda: len(self.attempts()) > before, seconds)
        (_, done), (checkpoint, _) = self.attempts()[before - 1 : before + 1]
        return done[-1], checkpoint


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons; end the jobs and the daemons at the end."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    host, cores = NODES[0], os.cpu_count()
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    configuration = CONFIGURATION.format(host=host, port=ports[0], user=getpass.getuser(), folder=folder)
    gpus = ""
    for node, port, device in zip(NODES, ports[1:], ("/dev/zero", "/dev/null"), strict=True):
        configuration += NODE.format(name=node, host=host, port=port, cores=cores)
        gpus += f"NodeName={node} Name=gpu File={device}\n"
    (folder / "slurm.conf").write_text(configuration)
    (folder / "gres.conf").write_text(gpus)
    slurm = Cluster(folder)
    try:
        slurm.start(*_munged(folder))
        slurm.wait_for("munge has its socket", (folder / "munge.socket").exists, 30)
        slurm.start("slurmctld", "-D")
        for node in NODES:
            slurm.start("slurmd", "-D", "-N", node)
        slurm.wait_for("both nodes are idle", slurm.nodes_are_idle, 60)
        yield slurm
        slurm.cancel_all()
    finally:
        for daemon in reversed(slurm.daemons.values()):
            daemon.terminate()
            daemon.wait(60)


def _munged(folder: Path) -> list[str]:
    """The command of munge's daemon, with a new key."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
    files |= {"log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
    return ["munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items())]

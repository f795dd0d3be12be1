"""The launchers, and the text of the first run."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import events_of, lines_of, load_script, wait_for

from olmo_train.checkpoint.folders import committed
from olmo_train.parallel import launch

LAUNCH = Path(__file__).parent.parent / "launch"


def test_the_standard_library_is_gathered_without_tests_and_other_packages():
    names = [name for name, _ in load_script(LAUNCH / "gather_text.py").standard_library()]
    assert "argparse.py" in names and "asyncio/events.py" in names
    assert not [name for name in names if "test" in Path(name).parts or "site-packages" in name]


def test_local_starts_one_process_each_and_gives_the_words_on(tmp_path, tiny_words, read_metrics):
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC": "2", "PYTHONPATH": str(LAUNCH.parent)}
    words = tiny_words("run", total_steps=2)
    out = subprocess.run([LAUNCH / "local.sh", *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert [line["world_size"] for line in read_metrics(tmp_path / "run")] == [2, 2]


@pytest.fixture
def launcher(tmp_path):
    """launcher(code, nproc=2, proc="/proc"): olmo_train.parallel.launch with a script of this code, in which `rank` is set.
    With another `proc` it finds its processes there."""

    def start(code: str, nproc: int = 2, proc: str = "/proc") -> subprocess.Popen:
        (tmp_path / "script.py").write_text(
            f"import os, signal, sys, time\nsignal.alarm(120)\nrank = int(os.environ['RANK'])\n{code}"
        )
        main = f"import sys; from olmo_train.parallel import launch; launch.PROC = launch.Path({proc!r}); "
        words = [sys.executable, "-c", main + "sys.exit(launch.main(sys.argv[1:]))", "--standalone", f"--nproc-per-node={nproc}"]
        environment = {**os.environ, "PYTHONPATH": str(LAUNCH.parent)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*words, str(tmp_path / "script.py")], env=environment, cwd=tmp_path, **pipes)

    return start


def test_the_launcher_exits_with_the_code_of_the_run_and_leaves_the_last_line_to_it(launcher):
    failing = (  # rank 0 ends first, when rank 1 ignores torchrun's SIGTERM
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(f'ready-{rank}', 'w').close()\n"
        "while not os.path.exists('ready-1'): time.sleep(0.01)\ntime.sleep(rank)\nprint('error: of a rank', file=sys.stderr)"
    )
    failed = launcher(f"{failing}\nsys.exit(3 if rank == 1 else 6)")
    assert (failed.communicate(timeout=60)[1], failed.returncode) == ("error: of a rank\n" * 2, 3)
    killed = launcher("rank == 1 and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    last = "error: rank 1: was killed by SIGKILL; run the same command again\n"
    assert (killed.communicate(timeout=60)[1], killed.returncode) == (last, 128 + signal.SIGKILL)


@pytest.mark.parametrize("proc", ["/proc", "/absent"])  # macOS has no /proc
def test_the_launcher_passes_signals_on_and_waits_for_the_run_to_save(launcher, proc):
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])\nos.write(1, b'ready\\n')\n"
    blocked += "signal.sigwait([signal.SIGUSR1])\ntime.sleep(1 + rank)\nos.write(1, b'saved\\n')\nsys.exit(75)"
    run = launcher(blocked, proc=proc)
    assert [run.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    run.send_signal(signal.SIGUSR1)
    assert (*run.communicate(timeout=60), run.returncode) == ("saved\nsaved\n", "", 75)


def test_the_launcher_reports_a_rendezvous_that_fails():
    words = [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=256.0.0.1:1",
        "--rdzv-conf=timeout=1,read_timeout=1",
        "script.py",
    ]
    failed = subprocess.run(
        [sys.executable, "-m", "olmo_train.parallel.launch", *words], capture_output=True, text=True, timeout=100
    )
    assert failed.returncode == 1
    assert re.search("error: --rdzv-endpoint: .*; check that all machines have started and reach it\n$", failed.stderr)


def test_the_launcher_refuses_restarts():
    assert launch.main(["--max-restarts=3", "-m", "olmo_train"]) == 2


@pytest.mark.parametrize(
    "codes, code",
    [
        ((0, 2), 2),
        ((2, 2), 2),
        ((6, 3), 3),
        ((-9, 6), 6),
        ((-15, 1), 1),
        ((75, 75), 75),
        ((-9, 75), 75),
        ((-15, -15), 143),
        ((7,), 7),
    ],
)
def test_the_exit_code_of_a_run_is_that_of_its_error(codes, code):
    assert launch.exit_code(codes) == code


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch.distributed.run", "olmo_train.parallel.launch"])
def test_signals_that_come_twice_save_ten_times_of_ten(module, tiny_words, tmp_path, read_metrics):
    """Slurm signals all processes of a job, and a launcher passes its signal on to its processes."""
    words = tiny_words("run", total_steps=100_000, **{"checkpoint.interval_steps": 100_000})
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
    command = [sys.executable, "-m", module, "--standalone", "--nproc-per-node=2", *([signals] if "torch" in module else [])]
    saved = 0
    for number in [signal.SIGTERM, signal.SIGUSR1] * 5:
        run = subprocess.Popen([*command, "-m", "olmo_train", "train", *words], stderr=subprocess.PIPE, text=True)
        wait_for(tmp_path / "run", saved + 3)
        children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        for process in (*map(int, children), run.pid):
            os.kill(process, number)
        _, stderr = run.communicate(timeout=60)
        saved, before = max(committed(tmp_path / "run")), saved
        assert saved > before and f"stopped: {number.name}: saved after step {saved}" in stderr
        assert len(read_metrics(tmp_path / "run")) == saved
        assert "torch" in module or run.returncode == 75


SRUN = """#!{python}
import os, signal, subprocess, sys
with open({log!r}, "a") as log:
    print("srun", os.environ["SRUN_CPUS_PER_TASK"], *sys.argv[1:], file=log)
task = subprocess.Popen([sys.executable, "-c", {task!r}], start_new_session=True)
def pass_on(number, _):  # srun turns SIGTERM into SIGKILL, and passes SIGUSR1 on to all processes
    os.killpg(task.pid, signal.SIGKILL if number == signal.SIGTERM else number)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, pass_on)
code = task.wait()
sys.exit(128 - code if code < 0 else code)
"""
TASK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (print("saved", flush=True), sys.exit(75)))
print("working", flush=True)
time.sleep(float(os.environ["SECONDS_OF_WORK"]))
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def slurm(tmp_path):
    """slurm(seconds, code=0, state="RUNNING", *words, **variables): the batch script with stand-ins for Slurm's commands, which
    note how they were called in slurm.log. The run works for some seconds and ends with this code, or saves on SIGUSR1; then
    squeue prints this state. config.yaml names a run_dir, tmp_path/run."""
    for name in ("config.yaml", "seed-3.yaml"):
        (tmp_path / name).write_text("run_dir: run\n")
    log = tmp_path / "log"
    (tmp_path / "srun").write_text(SRUN.format(python=sys.executable, log=str(log), task=TASK))
    (tmp_path / "scontrol").write_text(
        f'#!/bin/bash\necho "scontrol $*" >> {log}; [ "$1" != show ] || printf "first\nsecond\n"\n'
    )
    (tmp_path / "squeue").write_text(f'#!/bin/bash\necho "squeue $*" >> {log}; echo $STATE\n')
    for name in ("srun", "scontrol", "squeue"):
        (tmp_path / name).chmod(0o755)

    def start(seconds: float, code: int = 0, state: str = "RUNNING", *words: str, **variables: str) -> subprocess.Popen:
        log.write_text("")
        job = {"SLURM_JOB_NODELIST": "first,second", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
        job |= {"SLURM_CPUS_PER_TASK": "64", "PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        job |= {"SECONDS_OF_WORK": str(seconds), "CODE": str(code), "STATE": state, "PYTHONPATH": str(LAUNCH.parent)}
        command = ["bash", LAUNCH / "slurm.sbatch", *(words or ["config.yaml", "total_steps=9"])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env={**os.environ, **job, **variables}, cwd=tmp_path, **pipes)

    start.log = log
    return start


def test_a_slurm_job_starts_one_launcher_a_machine_with_the_cores_of_the_job(slurm):
    ports = set()
    for _ in range(2):
        assert slurm(0).wait(timeout=60) == 0
        called = slurm.log.read_text()
        (srun,) = [line for line in called.splitlines() if line.startswith("srun 64 ")]
        assert "--nnodes=2 --nproc-per-node=8" in called and "--rdzv-id=7 -m olmo_train train config.yaml total_steps=9" in called
        ports |= {int(re.search(r"--rdzv-endpoint=first:(\d+) ", called)[1])}
        assert "requeue" not in called
    assert len(ports) == 2  # a port for each job, so that two fit on one machine


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_slurm_job_at_its_times_end_lets_the_run_save_and_is_queued_again(slurm, number):
    job = slurm(60)
    assert job.stdout.readline() == "working\n"
    job.send_signal(number)
    assert job.wait(timeout=60) == 75
    assert job.stdout.read() == "saved\n"
    assert "scontrol requeue 7" in slurm.log.read_text()


@pytest.mark.parametrize(
    "code, state, exits_with, queued",
    [
        (0, "RUNNING", 0, False),  # finished
        (202, "RUNNING", 2, False),  # an error of the configuration, as the launcher returns it to srun
        (205, "RUNNING", 5, False),
        (1, "RUNNING", 1, False),  # srun itself
        (75, "RUNNING", 75, True),  # saved: the signal went to the run alone
        (6, "RUNNING", 6, True),  # a machine was lost
        (137, "RUNNING", 137, True),
        (75, "COMPLETING", 75, False),  # scancel; or Slurm queues it again
    ],
)
def test_a_slurm_job_is_queued_again_unless_it_has_finished_failed_or_been_cancelled(slurm, code, state, exits_with, queued):
    assert slurm(0, code, state).wait(timeout=60) == exits_with
    assert ("scontrol requeue 7" in slurm.log.read_text()) == queued


def test_a_slurm_job_is_queued_again_five_times_after_a_checkpoint_and_always_after_a_new_one(slurm, tmp_path):
    def ends(code: int, **variables: str) -> tuple[int, bool, str]:
        job = slurm(0, code, "RUNNING", "config.yaml", "--debug", **variables)
        error = job.communicate(timeout=60)[1]
        return job.returncode, "scontrol requeue" in slurm.log.read_text(), error

    (tmp_path / "run").mkdir()
    (tmp_path / "run/requeues.txt").write_text("job 7 ended after the start\n" * 4)
    assert ends(6) == (6, True, "")
    what = "error: run_dir: run has been queued again 5 times after the start without a new checkpoint; see the errors above"
    assert ends(6) == (6, False, f"{what}, and submit the job again\n")
    assert ends(137, SLURM_JOB_ID="8") == (137, True, "")  # as after another sbatch
    for step in ("9999999", "10000000"):
        (tmp_path / f"run/checkpoints/step-{step}").mkdir(parents=True)
        assert ends(75) == (75, True, "")
    assert (tmp_path / "run/requeues.txt").read_text().endswith("job 7 ended after step-10000000\n")


def test_the_tasks_of_a_slurm_array_have_a_run_dir_each(slurm):
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "5"}
    assert slurm(0, 75, "RUNNING", "seed-%a.yaml", "run_dir=runs/my seed-%a", **array).wait(timeout=60) == 75
    called = slurm.log.read_text()
    assert "train seed-3.yaml run_dir=runs/my seed-3\n" in called and "--rdzv-id=5_3 " in called
    assert "squeue --noheader --jobs=5_3 " in called and "scontrol requeue 5_3\n" in called
    job = slurm(0, 0, "RUNNING", "config.yaml", "run_dir=runs/one", **array)
    assert job.communicate(timeout=60)[1].startswith("error: run_dir: each task of an array needs a separate one; write %a")
    assert job.returncode == 2 and "srun" not in slurm.log.read_text()
    assert slurm(0, 0, "RUNNING", "%a.yaml", SLURM_NNODES="1", **array).wait(timeout=60) == 0
    assert "--nnodes=1 " in slurm.log.read_text() and "--rdzv-endpoint=localhost:" in slurm.log.read_text()


def yaml_documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def test_kubernetes_starts_pods_again_after_a_save_or_a_loss_and_not_after_an_error():
    job, runtime = yaml_documents("kubernetes.yaml")
    assert (job["kind"], runtime["kind"]) == ("TrainJob", "TrainingRuntime")
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pods = node["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    assert node["name"] == container["name"] == "node"  # the names that Trainer looks for

    def action(code: int, evicted: bool = False) -> str:
        """Of the first rule that fits a pod; Count: against backoffLimit."""
        for rule in pods["podFailurePolicy"]["rules"]:
            if "onPodConditions" in rule:
                fits = evicted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            else:
                codes = rule["onExitCodes"]
                assert (codes["containerName"], codes["operator"]) == ("node", "In")
                fits = code in codes["values"]
            if fits:
                return rule["action"]
        return "Count"

    assert [action(code) for code in (1, 2, 3, 4, 5)] == ["FailJob"] * 5
    assert [action(code) for code in (6, 75)] == ["Ignore"] * 2 and pods["backoffLimit"] > 0
    assert action(137) == "Count" and action(137, evicted=True) == "Ignore"
    assert pods["template"]["spec"]["restartPolicy"] == "Never"  # as a podFailurePolicy needs
    assert pods["template"]["spec"]["terminationGracePeriodSeconds"] >= 180  # as long as slurm.sbatch allows
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pods["template"]["spec"]["volumes"]}
    assert all(word.removeprefix("run_dir=").startswith(mounts["shared"]) for word in job["spec"]["trainer"]["args"])


@pytest.mark.slow
def test_the_command_of_kubernetes_joins_its_machines_and_a_signal_to_one_of_them_saves(tmp_path, tiny_words):
    """With the environment that Trainer sets, which names the first machine, and the launcher as the pod's first process."""
    job, _ = yaml_documents("kubernetes.yaml")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, *job["spec"]["trainer"]["command"][1:], *tiny_words("run", total_steps=100_000)]
    environment = {**os.environ, "PYTHONPATH": str(LAUNCH.parent), "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
    environment |= {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": port}
    machines = [subprocess.Popen(words, env=environment | {"PET_NODE_RANK": str(rank)}) for rank in range(2)]
    try:
        wait_for(tmp_path / "run", 3, seconds=300)
    finally:
        machines[1].send_signal(signal.SIGTERM)
    assert [machine.wait(timeout=120) for machine in machines] == [75, 75]
    (start,) = events_of(tmp_path / "run", "start")
    assert start["world_size"] == 2 and len(lines_of(tmp_path / "run")) == max(committed(tmp_path / "run"))


@pytest.mark.parametrize(
    "code, exits_with", [(0, 0), (1, 1), (2, 2), (5, 5), (6, 75), (75, 75), (128, 75), (137, 75), (143, 75), (7, 7)]
)
def test_skypilot_starts_a_job_again_after_a_save_or_a_loss_and_not_after_an_error(code, exits_with, tmp_path):
    (task,) = yaml_documents("skypilot.yaml")
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    (tmp_path / "python").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/python.log; exit {code}\n')
    (tmp_path / "sleep").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/sleep.log\n')
    for name in ("python", "sleep"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_TASK_ID": "7"}
    assert subprocess.run(["bash", "-c", task["run"]], env=environment, timeout=60).returncode == exits_with
    words = (tmp_path / "python.log").read_text()
    assert words.startswith("-m olmo_train.parallel.launch --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d ")
    assert " --rdzv-endpoint=10.0.0.1:29500 --rdzv-id=7 -m olmo_train train /shared/" in words
    assert list(task["volumes"]) == ["/shared"] and " run_dir=/shared/" in words
    # SkyPilot kills the other machines when one has ended: an error on one of them must end first
    assert (tmp_path / "sleep.log").exists() == (exits_with == 75)


def test_a_text_is_named_by_its_path_and_hashed_by_its_contents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("corpus", "a/corpus", "b/corpus", "my text"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.txt").write_text("same")
    (tmp_path / "documents.jsonl").write_text("{}")
    naming = load_script(LAUNCH / "name_text.py")
    names = [naming.name(Path(word)) for word in ("corpus", "a/corpus", "b/corpus", "my text", "documents.jsonl")]
    assert len(set(names)) == 5 and names[0] == "corpus" and names[4] == "documents"
    assert all(name.startswith(("corpus-", "my-text-")) and " " not in name for name in names[1:4])
    assert naming.name(tmp_path / "a/corpus") == naming.name(Path("./a/corpus/")) == names[1]
    before = naming.contents(Path("corpus"), "0.05")
    assert before == naming.contents(Path("a/corpus"), "0.05") != naming.contents(Path("corpus"), "0.1")
    (tmp_path / "corpus/.hidden").write_text("not read")
    assert naming.contents(Path("corpus"), "0.05") == before
    (tmp_path / "corpus/1.txt").write_text("edit")  # of the same size
    edited = naming.contents(Path("corpus"), "0.05")
    (tmp_path / "corpus/1.txt").rename(tmp_path / "corpus/2.txt")
    assert len({before, edited, naming.contents(Path("corpus"), "0.05")}) == 3


def test_a_text_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    code = f"""if True:
        import os, runpy, sys
        def stat(*_, **__): raise PermissionError(13, "Permission denied", "ten")
        sys.argv = ["name_text.py", "ten", "0.05"]
        with open({str(LAUNCH / "name_text.py")!r}) as script: source = script.read()
        os.stat = stat
        exec(source, {{"__name__": "__main__"}})"""
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (
        out.stderr == "error: TEXT=ten: ten: Permission denied; make it readable, or name another text\n" and out.returncode == 1
    )


def test_make_help_lists_the_goals():
    out = subprocess.run(["make", "help"], cwd=LAUNCH.parent, capture_output=True, text=True).stdout
    assert all(f"\n  make {goal} " in out for goal in ("train", "train TEXT=folder", "test", "slow", "check", "bench", "help"))


@pytest.fixture
def make_train(tmp_path):
    """make_train(*words): `make train`, with a stand-in for olmo-train; returns the process and the command lines it ran."""
    for name in ("Makefile", "launch", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(LAUNCH.parent / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "installed").touch()
    stand_in = """#!/bin/bash
    printf '%s|' "$@" >> log; echo >> log
    for word; do case $word in run_dir=*) run=${word#*=};; data.sources.text.path=*) path=${word#*=};; esac; done
    if [ "$1" = train ]; then mkdir -p $run; echo "      path: $path" > $run/config.yaml; touch -a $run/metrics.jsonl; fi
    if [ "$1" = evaluate ]; then sleep 0.02; touch $2/evaluation.json; fi
    """
    (tmp_path / "bin/olmo-train").write_text(stand_in)
    (tmp_path / "bin/olmo-train").chmod(0o755)

    def start(*words: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        (tmp_path / "log").write_text("")
        stand_ins = ["BIN=bin", "INSTALLED=installed", f"PYTHON={sys.executable}"]
        out = subprocess.run(["make", "train", *words, *stand_ins], cwd=tmp_path, capture_output=True, text=True)
        return out, [line.split("|")[:-1] for line in (tmp_path / "log").read_text().splitlines()]

    return start


def test_make_train_never_takes_another_text_for_the_one_that_is_named(make_train, tmp_path):
    for folder in ("a/corpus", "b/corpus", "it's my text"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.txt").write_text(folder)
    runs = {}
    for text in ("a/corpus", "b/corpus", "it's my text"):
        out, lines = make_train(f"TEXT={text}")
        assert out.returncode == 0, out.stderr
        assert [line[1] for line in lines if line[0] in ("prepare-data", "train-tokenizer")] == [text, text]
        (runs[text],) = [word for line in lines for word in line if word.startswith("run_dir=")]
    assert len(set(runs.values())) == 3
    (tmp_path / "a/corpus/1.txt").write_text("a/CORPUS")  # edited in place, with the same size
    out, lines = make_train("TEXT=a/corpus")
    assert lines == []  # nothing is prepared, and its old run is not continued
    run = runs["a/corpus"].removeprefix("run_dir=")
    assert out.returncode == 2 and f"error: {run}: " in out.stderr and f"RUN={run}-2" in out.stderr
    out, lines = make_train("TEXT=a/corpus", f"RUN={run}-2")
    assert out.returncode == 0 and f"run_dir={run}-2" in lines[2]
    out, lines = make_train("TEXT=a/corpus", f"RUN={run}-2")  # finished: it is not drawn and evaluated again
    assert out.returncode == 0 and [line[0] for line in lines[-2:]] == ["prepare-data", "train"], lines
    assert f"{run}-2 has its curves.png, curves.html and evaluation.json" in out.stdout and "test -e" not in out.stdout
    out, lines = make_train("TEXT=a/corpus", f"RUN={run}-2", "PROMPT=To be")
    assert [line[0] for line in lines[-5:]] == ["train", "curves", "curves", "generate", "evaluate"] and "To be" in lines[-2]
    (tmp_path / f"{run}-2/metrics.jsonl").touch()  # longer now
    assert len(make_train("TEXT=a/corpus", f"RUN={run}-2")[1]) == 7
    out, lines = make_train("TEXT=nowhere")
    assert out.returncode == 2 and "TEXT=nowhere: there is no such file" in out.stderr and not lines

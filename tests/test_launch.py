"""The launchers, and the text of the first run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import load_script

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
    if [ "$1" = train ]; then mkdir -p $run; echo "      path: $path" > $run/config.yaml; fi
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
    assert [line[0] for line in lines] == ["train-tokenizer", "prepare-data"]  # and its old run is not continued
    run = runs["a/corpus"].removeprefix("run_dir=")
    assert out.returncode == 2 and f"error: {run}: " in out.stderr and f"RUN={run}-2" in out.stderr
    out, lines = make_train("TEXT=a/corpus", f"RUN={run}-2")
    assert out.returncode == 0 and f"run_dir={run}-2" in lines[2]
    out, lines = make_train("TEXT=nowhere")
    assert out.returncode == 2 and "TEXT=nowhere: there is no such file" in out.stderr and not lines

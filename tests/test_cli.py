"""The command line as a stranger meets it: every mistake has its exit code and ends in one `error:` line."""

import argparse
import errno
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ranks import environments, exit_code, fork

import olmo_train
from olmo_train.__main__ import EXAMPLES, VERBS, main
from olmo_train.commands.common import split_config


@pytest.fixture
def mistake(run_main):
    """mistake(*words): (exit code, last line on stderr) of the command."""

    def call(*words):
        done = run_main(*words)
        assert "Traceback" not in done.stderr
        return done.returncode, (done.stderr.splitlines() or [""])[-1]

    return call


JOIN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
MISTAKES = {
    "unknown key": (["optim.peek_lr=1"], 2, "optim.peek_lr: is not a known key; did you mean 'optim.peak_lr'?"),
    "wrong type": (["total_steps=many"], 2, "total_steps: must be a whole number, got 'many'"),
    "wrong choice": (["model.norm=rmsnorm"], 2, "model.norm: 'rmsnorm' is not a choice; did you mean 'rms_norm'?"),
    "heads not divisible": (["model.n_heads=5"], 2, "model.n_heads: 5 does not divide d_model 64"),
    "missing config": (["none.yaml"], 2, "none.yaml: there is no such configuration file"),
    "no YAML": (["bad.yaml"], 2, "bad.yaml: is not valid YAML"),
    "replicas": (["parallel.replicas=2"], 2, "parallel.replicas: 2 does not divide the 1 process"),
    "run_dir is a file": (["run_dir=tokens.npy"], 2, "run_dir: tokens.npy cannot be written"),
    "missing shard": (["data.sources.a.path=gone.npy"], 3, "data.sources.a.path: gone.npy does not exist"),
    "empty glob": (["data.sources.a.path=gone*.npy"], 3, "gone*.npy: matches no file"),
    "empty shard": (["data.sources.a.path=empty.npy"], 3, "empty.npy: is an empty shard"),
    "an odd byte": (["data.sources.a.path=odd.npy"], 3, "odd.npy: has 1001 bytes, no multiple of 2"),
    "wrong dtype": (["data.sources.a.dtype=uint32"], 3, "tokens.npy: token "),
    "vocabulary too small": (["model.vocab_size=300"], 3, "tokens.npy: token "),
    "unprepared folder": (["data.sources.a.path=folder"], 3, "folder: has no meta.json"),
    "too little data": (["data.sources.a.path=short.npy"], 3, "data.sources.a: 0 instances of 64 tokens in "),
    "missing validation": (["data.validation.v.path=gone.npy"], 3, "data.validation.v.path: gone.npy does not exist"),
    "no checkpoint to branch from": (["resume_from=folder"], 4, "folder: is neither a checkpoint folder nor a run_dir"),
    "no checkpoint to start from": (["init_from=nowhere"], 4, "nowhere: is neither a checkpoint folder nor a run_dir"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_train_has_its_exit_code_and_one_error_line(name, mistake, tiny_words, tmp_path):
    words, code, expected = MISTAKES[name]
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "odd.npy").write_bytes(bytes(1001))
    (tmp_path / "short.npy").write_bytes(bytes(64))
    (tmp_path / "folder").mkdir()
    relative = [word.replace(f"{tmp_path}/", "") for word in tiny_words()]
    found, line = mistake("train", *relative, *words)
    assert (found, line[: len("error: " + expected)]) == (code, "error: " + expected)


def test_a_mistake_leaves_no_run_dir(mistake, tiny_words, tmp_path):
    mistake("train", *tiny_words(), "data.sources.a.path=gone.npy")
    mistake("train", *tiny_words(), "optim.peek_lr=1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "error: olmo-train: the following arguments are required: VERB"),
        (["trian"], "error: olmo-train: 'trian' is not a verb; did you mean 'train'?"),
        (
            ["my-run.yaml", "seed=1"],
            "error: olmo-train: 'my-run.yaml' is not a verb; did you mean 'olmo-train train my-run.yaml'?",
        ),
        (
            ["--bogus", "train", "a.yaml"],
            "error: olmo-train train: unrecognized arguments: --bogus a.yaml; `olmo-train train --help`",
        ),
        (
            ["curves", "x", "--metrics", "y"],
            "error: olmo-train curves: unrecognized arguments: --metrics y; did you mean '--metric'?",
        ),
        (
            ["prepare-data", "x", "--tokeniser", "y"],
            "error: olmo-train prepare-data: the following arguments are required: "
            "--output, --tokenizer; did you mean '--tokenizer'?",
        ),
        (["train"], "error: olmo-train train: the following arguments are required"),
        (["train", "--bogus", "a.yaml"], "error: olmo-train train: unrecognized arguments: --bogus"),
        (["train", "run_dir=x"], "error: data"),
        (["train", "--keys", "peak"], "error: --keys: no key starts with 'peak'; did you mean 'optim.peak_lr'?"),
        (["train", "run_dir=x", "data.order=olmo"], "error: data.sources: names no data"),
        (["curves"], "error: olmo-train curves: the following arguments are required"),
        (["plan", "x=1", "--gpus", "many"], "error: olmo-train plan: argument --gpus"),
    ],
)
def test_a_usage_error_has_the_form_of_every_other_error(mistake, words, expected):
    code, line = mistake(*words)
    assert code == 2 and line.startswith(expected)


def test_debug_shows_where_an_error_came_from(mistake, tiny_words):
    from olmo_train.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["train", "--debug", *tiny_words(), "seed=x"])


def test_the_other_ranks_leave_the_telling_to_rank_0(mistake, tiny_words, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert mistake("train", *tiny_words(), "seed=x") == (2, "")
    assert mistake("train", "--bogus", "a.yaml") == (2, "")
    assert mistake("curves", "nowhere")[1].startswith("error: nowhere: ")  # a verb of one process has no rank 0 to report it
    assert mistake("generate")[1].startswith("error: olmo-train generate: ")
    assert mistake("trian")[1].startswith("error: olmo-train: 'trian' is not a verb")


INCOMPLETE = {
    "RANK": ({"RANK": "1"}, "has RANK=1, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start the run with torchrun"),
    "WORLD_SIZE": ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but not RANK, "),
    "LOCAL_RANK": ({"LOCAL_RANK": "0"}, "has LOCAL_RANK=0, but not RANK, "),
    "LOCAL_WORLD_SIZE": ({"LOCAL_WORLD_SIZE": "1"}, "has LOCAL_WORLD_SIZE=1, but not RANK, "),
    "no address": ({"RANK": "1", "WORLD_SIZE": "2"}, "has RANK=1 WORLD_SIZE=2, but not MASTER_ADDR, MASTER_PORT;"),
    "empty": ({"RANK": "", "WORLD_SIZE": "2"} | JOIN, "RANK is empty in RANK= WORLD_SIZE=2 "),
    "no number": ({"RANK": "x", "WORLD_SIZE": "2"} | JOIN, "RANK must be a whole number in RANK=x "),
    "no local number": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"} | JOIN, "LOCAL_RANK must be a whole number in "),
    "too high": ({"RANK": "2", "WORLD_SIZE": "2"} | JOIN, "RANK must be below 2 in RANK=2 WORLD_SIZE=2 "),
    "no process": ({"RANK": "0", "WORLD_SIZE": "0"} | JOIN, "RANK must be below 0 in "),
    "local": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"} | JOIN, "LOCAL_RANK must be below 1 "),
    "port": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "http"}, "MASTER_PORT must be a whole number "),
}  # fmt: skip


@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_launchers_environment_that_is_incomplete_is_one_error_on_every_rank(name, mistake, tiny_words, monkeypatch):
    environment, expected = INCOMPLETE[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    code, line = mistake("train", *tiny_words())
    assert code == 2 and line.startswith(f"error: environment: {expected}")
    assert mistake("prepare-data", "gone", "--output", "o", "--tokenizer", "gone.json")[1].startswith("error: gone.json: ")


def test_the_address_that_a_cluster_sets_alone_means_one_process(monkeypatch):
    from olmo_train.parallel.processes import Processes, announced

    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert announced() == Processes(rank=0, size=1, local_rank=0, launched=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert announced() == Processes(rank=1, size=2, local_rank=0, launched=True)


def test_two_ranks_tell_a_mistake_once(tiny_words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", *tiny_words(), "data.sources.a.path=gone.npy"]
    ranks = [fork(lambda: main(words), tmp_path / "stderr", **environment) for environment in environments(2)]
    assert [exit_code(rank) for rank in ranks] == [3, 3]
    assert (tmp_path / "stderr").read_text().splitlines() == [
        f"error: data.sources.a.path: gone.npy does not exist ({tmp_path}/gone.npy); "
        "name an existing token file, or a folder that prepare-data wrote"
    ]


def test_a_name_with_an_equals_sign_is_a_file_where_there_is_one(tmp_path, mistake):
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1/x.txt").write_text("total_steps: 5\n")
    assert split_config(["lr=0.1/x.txt", "lr=0.1/y.yaml", "a.yaml", "b.c=d", "lr=0.1"]) == (
        ["lr=0.1/x.txt", "lr=0.1/y.yaml", "a.yaml"], ["b.c=d", "lr=0.1"])  # fmt: skip
    assert mistake("plan", "lr=0.1/y.yaml")[1] == (
        "error: lr=0.1/y.yaml: ends in .yaml, so it is read as the name of a file, and there is no such file; "
        """to set a key to this text, put quotes around the value: lr='"0.1/y.yaml"'"""
    )


def test_keys_may_stand_before_and_behind_options(mistake, tiny_words):
    assert (
        mistake("plan", "--gpus", "2", *tiny_words(), "total_steps=x")[1] == "error: total_steps: must be a whole number, got 'x'"
    )
    assert (
        mistake("plan", *tiny_words(), "--gpus", "2", "total_steps=x")[1] == "error: total_steps: must be a whole number, got 'x'"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_module_and_its_help(verb, capsys):
    module = importlib.import_module(f"olmo_train.commands.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert callable(module.run) and module.__doc__
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: olmo-train {verb} ") and out.endswith(f"example:\n  olmo-train {EXAMPLES[verb]}\n")
    assert EXAMPLES[verb].split()[0] == verb


def test_without_a_verb_the_help_is_printed_and_version_prints_the_version(run_main):
    done = run_main()
    assert done.returncode == 2 and done.stdout.startswith("usage: olmo-train ") and "inspect-data" in done.stdout
    assert done.stderr == (
        f"error: olmo-train: the following arguments are required: VERB; for example: olmo-train {EXAMPLES['train']}\n"
    )
    assert run_main("--version").stdout == f"olmo-train {olmo_train.__version__}\n"


RUN = """
run_dir: runs/other
total_steps: 12
global_batch_size: 4
micro_batch_size: 4
model: {d_model: 32, n_layers: 1, n_heads: 2, mlp_hidden: 64, vocab_size: 4096, padded_vocab_size: 4096, seq_len: 32}
data:
  sources: {mine: {path: data/mine}}
  validation: {mine: {path: data/mine/validation}}
optim: {warmup_steps: 2}
parallel: {precision: fp32}
log: {interval_steps: 1, wandb: {mode: disabled}}
"""


def test_the_example_of_every_help_works(run_main, tmp_path):
    """All of them in one folder, in the order in which one needs the others."""
    (tmp_path / "my-text").mkdir()
    for i in range(40):
        (tmp_path / f"my-text/{i}.txt").write_text(
            f"Once upon a time there was a king who had {i} daughters and {i + 2} sons. " * 9
        )
    (tmp_path / "my-run.yaml").write_text(RUN)
    (tmp_path / "configs").symlink_to(Path(__file__).parent.parent / "configs")
    first = ["train-tokenizer", "prepare-data", "verify-data", "config", "doctor", "bench", "plan", "train"]
    for verb in [*first, *(verb for verb in VERBS if verb not in first)]:
        done = run_main(*shlex.split(EXAMPLES[verb]))
        assert done.returncode == 0 or verb == "doctor", (verb, done.stdout, done.stderr)  # doctor reports on this machine
        assert "error: " not in done.stderr
    assert {"curves.html", "exported", "data", "runs"} <= {path.name for path in tmp_path.iterdir()}


def test_the_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(verb in out and text.split()[0] in out for verb, text in VERBS.items())


def test_a_run_whose_reader_goes_away_trains_on(tiny_words, tmp_path, read_metrics):
    """olmo-train train ... | head"""
    read, write = os.pipe()
    os.close(read)
    words = tiny_words("run", total_steps=2, **{"optim.warmup_steps": 1})

    def train():
        os.dup2(write, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        return main(["train", *words])

    run = fork(train, tmp_path / "stderr")
    os.close(write)
    assert (exit_code(run), (tmp_path / "stderr").read_text()) == (0, "")
    assert len(read_metrics(tmp_path / "run")) == 2 and (tmp_path / "run/checkpoints/step-0000002").is_dir()


def test_train_prints_plain_lines_and_exits_0(run_main, tiny_words, tmp_path):
    done = run_main("train", *tiny_words("run", total_steps=3))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    assert "\x1b" not in done.stdout
    again = run_main("train", *tiny_words("run", total_steps=3))
    assert (again.returncode, again.stdout.splitlines()) == (
        0, [f"{tmp_path}/run is finished: 3 of 3 steps; set total_steps higher to continue"])  # fmt: skip


def test_all_that_a_run_writes_lies_in_its_run_dir(tiny_words, tmp_path, monkeypatch):
    """Nothing beside it, and nothing in the folder for temporary files stays."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = {path.name for path in tmp_path.iterdir()}
    assert exit_code(fork(lambda: main(["train", *tiny_words("run", total_steps=2)]), os.devnull)) == 0
    assert {path.name for path in tmp_path.iterdir()} - before == {"run"}
    assert list((tmp_path / "temporary").iterdir()) == []
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl"}


@pytest.mark.parametrize("own, used", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_the_user_says_so(own, used):
    """In a library's process, too: OpenMP reads the setting when torch is loaded, which train.py does."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "true", "OMP_WAIT_POLICY": own or ""}
    if own is None:
        del environment["OMP_WAIT_POLICY"]
    loaded = subprocess.run([sys.executable, "-c", "import olmo_train.train"], env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert f"OMP_WAIT_POLICY = '{used}'" in loaded.stderr


def test_the_figures_of_a_benchmark_are_json_and_nothing_else(run_main, tiny_words):
    done = run_main("bench", *tiny_words("unused", total_steps=50), "--steps", 2, "--warmup", 1, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["tokens_per_second"] > 0 and figures["phase_seconds"].keys() >= {"forward", "backward", "clip", "optimizer"}
    assert "starts: " in done.stderr


# ---- the world outside


@pytest.fixture
def in_the_way(tmp_path):
    """A file where a folder is wanted, folders where a file is wanted, and text to read."""
    (tmp_path / "file").write_text("x")
    for name in ("d.html", "d.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "docs.jsonl").write_text("".join(f'{{"text": "sun moon tree {i}"}}\n' for i in range(50)))
    main(["train-tokenizer", str(tmp_path / "docs.jsonl"), "--output", str(tmp_path / "tok.json"), "--vocab-size", "300"])


OUTPUTS = {
    "a file in the way of a folder": ("prepare-data docs.jsonl --tokenizer tok.json --output file", "--output: file cannot"),
    "a folder that cannot be made": ("prepare-data docs.jsonl --tokenizer tok.json --output /proc/x", "--output: /proc/x cannot"),
    "a file below a file": ("train-tokenizer docs.jsonl --output file/tok.json", "--output: file/tok.json cannot"),
    "a folder in the way of a file": ("train-tokenizer docs.jsonl --output d.json", "--output: d.json cannot"),
    "the working directory": ("train-tokenizer docs.jsonl --output .", "--output: . cannot"),
    "plan": ("plan model.d_model=64 model.n_heads=4 model.n_layers=1 --output d.html", "--output: d.html cannot"),
    "plan to a full disk": ("plan model.d_model=64 model.n_heads=4 model.n_layers=1 --output full.html", "--output: full.html"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_written_is_a_mistake_with_exit_code_2(name, mistake, in_the_way, tmp_path):
    words, expected = OUTPUTS[name]
    (tmp_path / "full.html").symlink_to("/dev/full")
    code, line = mistake(*words.split())
    assert (code, line[: len(expected) + 7]) == (2, f"error: {expected}")
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".tmp")]


def test_an_input_that_cannot_be_opened_is_named_with_exit_code_3(mistake, in_the_way, tmp_path, monkeypatch):
    from olmo_train.data.prepare import prepare

    def refuse(options, *callbacks):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "docs.jsonl")

    monkeypatch.setattr(prepare, "prepare", refuse)  # root may read everything
    expected = "error: docs.jsonl: Permission denied; name another file, or change its permissions"
    assert mistake("prepare-data", "docs.jsonl", "--tokenizer", "tok.json", "--output", "docs") == (3, expected)


def test_words_that_are_no_text_are_refused(mistake):
    code, line = mistake("generate", "run", "--prompt", "a\udcff")
    assert code == 2 and line.startswith("error: olmo-train: 'a\\udcff' is not text in this locale's encoding, utf-8; ")


def test_a_name_that_is_no_text_is_one_error(mistake, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / os.fsdecode(b"caf\xe9.txt")).write_text("sun moon")
    main(["train-tokenizer", "texts", "--output", "tok.json", "--vocab-size", "300"])
    code, line = mistake("prepare-data", "texts", "--tokenizer", "tok.json", "--output", "o", "--workers", 1)
    assert code in (0, 3) and (code == 0 or line.startswith("error: ") and "caf\\udce9.txt" in line)


def test_ctrl_c_is_one_line_and_130(mistake, in_the_way, monkeypatch):
    from olmo_train.data.prepare import prepare

    def interrupt(options, *callbacks):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare", interrupt)
    found = mistake("prepare-data", "docs.jsonl", "--tokenizer", "tok.json", "--output", "o")
    assert found == (130, "error: prepare-data: interrupted; the same command continues")


PRINTS = """
import argparse, sys
from olmo_train import __main__ as cli
cli.open_streams()
open_file = open(sys.argv[1], "w")
code = cli._run(lambda _: print("x" * 100_000), argparse.Namespace(verb="plan", debug=False))
sys.exit(cli._flush_stdout(code))
"""


@pytest.mark.parametrize(
    "redirect, code, expected",
    [
        (">&-", 0, ""),
        (">&- <&-", 0, ""),
        ("> /dev/full", 1, "error: plan: No space left on device; --debug shows where\n"),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
    ],
)
def test_a_stdout_that_is_closed_full_or_left_ends_no_command_in_a_traceback(redirect, code, expected, tmp_path):
    words = ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-c", PRINTS, str(tmp_path / "file")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, expected)
    assert (tmp_path / "file").read_text() == ""  # a file that is opened later does not take stdout's number


def test_a_full_disk_behind_stdout_is_seen_before_python_ends(tmp_path):
    words = [sys.executable, "-c", PRINTS.replace("100_000", "10"), str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "error: stdout: cannot be written: No space left on device\n")


def test_a_locale_without_the_characters_of_a_name_changes_neither_files_nor_the_run(run_cli, tiny_words, tmp_path):
    words = tiny_words("läufe", total_steps=1)
    done = run_cli("train", *words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "l\\xe4ufe starts: " in done.stdout
    assert "läufe" in (tmp_path / "läufe/config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "environment, terminal, color, redraws",
    [
        ({}, True, True, True),
        ({}, False, False, False),
        ({"NO_COLOR": "1"}, True, False, True),
        ({"NO_COLOR": ""}, True, True, True),
        ({"FORCE_COLOR": "1"}, False, True, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False, True),
        ({"TERM": "dumb"}, True, False, False),
    ],
)
def test_colours_and_redrawn_lines_follow_the_environment(environment, terminal, color, redraws, monkeypatch):
    from olmo_train.log import console

    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert (console.has_color(), console.is_terminal(sys.stdout)) == (color, redraws)


def test_a_conversion_into_the_working_directory_is_refused(tmp_path, monkeypatch):
    from olmo_train.convert.folders import new_folder
    from olmo_train.errors import ConfigError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^\.: is the working directory; name a new folder"), new_folder(Path(".")):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/x: cannot be written: .*; name another place"), new_folder(Path("file/x")):
        pass

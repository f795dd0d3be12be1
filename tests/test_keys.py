"""Finding a key: what an unknown one suggests, what set each value, what two runs differ in, and the Tab key."""

import os

import pytest
import yaml

from olmo_train import config
from olmo_train.errors import OTHER_NAMES, near_keys
from olmo_train.train_config import TrainConfig, keys

KNOWN = [key.name for key in keys()]


def test_the_walk_over_the_dataclasses_finds_the_keys_that_are_listed():
    assert [name for name, *_ in config.walk(TrainConfig)] == KNOWN


def test_the_names_of_other_frameworks_stand_for_keys_that_there_are_and_are_no_keys_themselves():
    others = [other for names in OTHER_NAMES.values() for other in names]
    assert OTHER_NAMES.keys() <= set(KNOWN)
    assert not set(others) & set(KNOWN) and len(others) == len(set(others)) and others == [other.lower() for other in others]


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("lr", ["optim.peak_lr"]),
        ("optim.lr", ["optim.peak_lr"]),
        ("learning_rate", ["optim.peak_lr"]),
        ("peak_lr", ["optim.peak_lr"]),
        ("batch_size", ["global_batch_size"]),
        ("max_steps", ["total_steps"]),
        ("model.hidden_size", ["model.d_model"]),
        ("model.hidden_dim", ["model.mlp_hidden"]),
        ("block_size", ["model.seq_len"]),
        ("wandb", ["log.wandb"]),
        ("weight_decya", ["optim.weight_decay"]),
        ("optim.betsa", ["optim.betas"]),
        ("data.sources.wiki.pth", ["data.sources.wiki.path"]),
        ("data.path", ["data.sources.NAME.path", "data.validation.NAME.path"]),
        ("interval_steps", ["checkpoint.interval_steps", "eval.interval_steps", "log.interval_steps"]),
        ("dropout", []),
    ],
)
def test_an_unknown_key_suggests_the_key_that_was_meant(typed, meant):
    assert near_keys(typed, KNOWN) == meant


def test_a_key_that_resembles_nothing_lists_its_section_and_the_way_to_all_keys(run_main):
    done = run_main("config", "run_dir=r", "data.sources.a.path=x", "data.sources.a.colour=red")
    assert done.stderr == (
        "error: data.sources.a.colour: is not a known key; known: dtype, path, weight; "
        "`olmo-train train --keys` lists all with their meaning\n"
    )


FIRST = """
run_dir: runs/a
seed: 1
model: {d_model: 64, n_heads: 4}
data: {sources: {wiki: {path: [a.npy, b.npy]}}}
optim: {betas: [0.9, 0.95]}
log: {wandb: {name: "%s"}}
""" % ("a long name " * 12)  # longer than a line of YAML
SECOND = "model: {n_heads: 8}\noptim: {peak_lr: 1e-3}\n"


@pytest.fixture
def two_files(tmp_path):
    (tmp_path / "first.yaml").write_text(FIRST)
    (tmp_path / "second.yaml").write_text(SECOND)


def test_config_names_what_set_each_value_and_stays_a_valid_file(run_main, two_files, tmp_path):
    words = ["first.yaml", "second.yaml", "seed=2"]
    done = run_main("config", *words)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split("#")[0].strip(): line.split("# ")[1] for line in done.stdout.splitlines() if "#" in line}
    assert lines["run_dir: runs/a"] == lines["d_model: 64"] == lines["path:"] == lines["betas:"] == "first.yaml"
    assert lines["n_heads: 8"] == lines["peak_lr: 0.001"] == "second.yaml"
    assert lines["seed: 2"] == "command line"
    assert lines["total_steps: null"] == lines["n_layers: 32"] == lines["deny: []"] == "default"
    assert done.stdout.count("# ") == len(config.flatten(yaml.safe_load(done.stdout)))  # one comment for each value
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert config.load(TrainConfig, ["printed.yaml"]) == config.load(TrainConfig, words[:2], words[2:])


def test_a_section_that_a_later_file_replaces_was_not_set_by_the_earlier_one(tmp_path):
    for name, text in {"a": "x: {y: 1, z: 2}", "b": "x: null", "c": "x: {z: 3}"}.items():
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in "abc"]
    assert config.origins(files) == {"x.z": str(files[2])}
    assert config.origins(files[:1], ["x.z=4"]) == {"x.y": str(files[0]), "x.z": "command line"}


def test_config_diff_shows_the_keys_that_differ_with_both_values(run_main, two_files, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(run_main("config", "first.yaml", "second.yaml", "data.sources.code.path=c").stdout)
    done = run_main("config", "--diff", "first.yaml", "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["first.yaml", "run"],
        ["model.n_heads", "4", "8"],
        ["optim.peak_lr", "0.0003", "0.001"],
        ["data.sources.code.path", "(no", "such", "key)", "c"],
        ["data.sources.code.weight", "(no", "such", "key)", "1.0"],
        ["data.sources.code.dtype", "(no", "such", "key)", "null"],
    ]
    assert run_main("config", "--diff", "run", "run").stdout == "every key has the same value in both\n"
    assert run_main("config", "--diff", "second.yaml", "run").returncode == 0  # a part of a configuration
    gone = run_main("config", "--diff", "run", "ruin")
    assert (gone.returncode, gone.stderr.startswith("error: ruin: there is no such configuration file")) == (2, True)
    more = run_main("config", "first.yaml", "--diff", "run", "run")
    message = "error: --diff: compares two runs and takes nothing else; leave out first.yaml\n"
    assert (more.returncode, more.stderr) == (2, message)


def completed(line: str) -> list[str]:
    """What the shell offers after this line."""
    from ranks import exit_code, fork

    from olmo_train.__main__ import main

    read, write = os.pipe()

    def ask():
        os.dup2(write, 8)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 9)
        return main([])

    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line}
    child = fork(ask, os.devnull, **variables, COMP_POINT=str(len(line)))
    assert exit_code(child) == 0
    os.close(write)
    with open(read) as answer:
        return [word.strip() for word in answer.read().splitlines()]


def test_the_tab_key_completes_verbs_options_files_keys_and_their_values(tmp_path, monkeypatch):
    pytest.importorskip("argcomplete")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optimal.yaml").touch()
    (tmp_path / "optimal.txt").touch()
    assert completed("olmo-train tra") == ["train", "train-tokenizer"]
    assert completed("olmo-train curves --sm") == ["--smooth"]
    assert completed("olmo-train train optim") == ["optimal.yaml", *(f"{name}=" for name in KNOWN if name.startswith("optim"))]
    assert completed("olmo-train train optim.schedule=c") == ["optim.schedule=cosine", "optim.schedule=constant"]
    assert completed("olmo-train train parallel.compile=t") == ["parallel.compile=true"]


def test_the_script_for_the_tab_key_is_printed_or_its_package_is_named(run_main, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "argcomplete", None)
    done = run_main("--completion", "bash")
    assert done.returncode == 2 and done.stderr.endswith(
        "error: olmo-train: argument --completion: needs argcomplete; pip install 'olmo-train[completion]'\n"
    )
    monkeypatch.undo()
    pytest.importorskip("argcomplete")
    done = run_main("--completion", "bash")
    assert done.returncode == 0 and "complete -o" in done.stdout and "olmo-train" in done.stdout

"""Thirty mistakes of a first day: each ends within seconds in one line with the key or file, the value, and what to type."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import words_of

SECONDS = 10  # longest silence; a mistake takes well below one, on a quiet machine


@pytest.fixture(scope="module")
def place(tmp_path_factory, stream):
    """Texts, two tokenizers, prepared data, configuration files, and a run of 12 steps with checkpoints 5, 10 and 12."""
    from olmo_train.__main__ import main

    place, before = tmp_path_factory.mktemp("first-day"), os.getcwd()
    os.chdir(place)
    try:
        Path("texts").mkdir()
        for i in range(60):
            Path(f"texts/{i}.txt").write_text(f"the sun and the moon and {i} stars " * 20)
        Path("other.jsonl").write_text("".join(f'{{"text": "quite other words {i}"}}\n' for i in range(300)))
        Path("fields.jsonl").write_text("".join(f'{{"content": "some words {i}"}}\n' for i in range(9)))
        Path("nothing").mkdir()
        Path("empty.txt").touch()
        Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40)
        Path("file").touch()
        Path("tokens.npy").write_bytes(stream)
        Path("model.yaml").write_text("model: {d_model: 64}\n")
        Path("empty.yaml").touch()
        Path("tab.yaml").write_text("model:\n\td_model: 64\n")
        for words in (
            "train-tokenizer texts --output one.json --vocab-size 300",
            "train-tokenizer other.jsonl --output two.json --vocab-size 300",
            "prepare-data texts --output data/one --tokenizer one.json --workers 1",
            "prepare-data other.jsonl --output data/two --tokenizer two.json --workers 1",
        ):
            assert main(words.split()) == 0
        assert main(["train", *words_of("runs/done", "tokens.npy")]) == 0
        shutil.copytree("runs/done", "runs/moved")
        shutil.copytree("data/one", "data/damaged")
        shard = Path("data/damaged/tokens-00000.bin")
        shard.write_bytes(shard.read_bytes()[:-2] + b"\1\1")
    finally:
        os.chdir(before)
    return place


def run(**changes) -> list[str]:
    """A run that works, but for the changes."""
    return ["train", *words_of("runs/new", "tokens.npy", **changes)]


SOURCE = "data.sources.a.path"
PREPARE = ["prepare-data", "--output", "data/new", "--tokenizer", "one.json", "--workers", "1"]
MISTAKES = {  # the words, the exit code, and the last line, in which ... stands for any text
    "no argument": (
        [], 2,
        "olmo-train: the following arguments are required: VERB; for example: olmo-train train my-run.yaml",
    ),
    "wrong verb": (
        ["trian", "model.yaml"], 2,
        "olmo-train: 'trian' is not a verb; did you mean 'train'?",
    ),
    "wrong flag": (
        ["curves", "runs/done", "--metrics", "x"], 2,
        "olmo-train curves: unrecognized arguments: --metrics x; did you mean '--metric'?",
    ),
    "a key as a flag": (
        ["train", "model.yaml", "--run_dir", "x"], 2,
        "olmo-train train: unrecognized arguments: --run_dir x; did you mean 'run_dir=x'?",
    ),
    "missing file": (
        ["train", "modle.yaml"], 2,
        "modle.yaml: there is no such configuration file; did you mean 'model.yaml'?",
    ),
    "folder for file": (
        ["train", "runs/done"], 2,
        "runs/done: is a folder, not a YAML file; did you mean 'runs/done/config.yaml'?",
    ),
    "empty YAML": (
        ["train", "empty.yaml"], 2,
        "run_dir: is missing and has no default; set it as run_dir=VALUE",
    ),
    "tab in YAML": (
        ["train", "tab.yaml"], 2,
        "tab.yaml: is not valid YAML: line 2 is indented with a tab; use spaces",
    ),
    "unknown key": (
        run(**{"model.layers": 2}), 2,
        "model.layers: is not a known key; did you mean 'model.n_layers'?",
    ),
    "lr=": (
        run(lr=1e-3), 2,
        "lr: is not a known key; did you mean 'optim.peak_lr'?",
    ),
    "wrong type": (
        run(total_steps="many"), 2,
        "total_steps: must be a whole number, got 'many'",
    ),
    "negative value": (
        run(global_batch_size=-8), 2,
        "global_batch_size: must be at least 1, got -8",
    ),
    "list for number": (
        run(total_steps="[10, 20]"), 2,
        "total_steps: must be a whole number, got [10, 20]",
    ),
    "no data": (
        run(**{SOURCE: None}), 2,
        "data.sources: names no data; set data.sources.NAME.path to a prepared folder or token file",
    ),
    "data path wrong": (
        run(**{SOURCE: "data/oen"}), 3,
        "data.sources.a.path: data/oen does not exist (...); did you mean 'data/one'?",
    ),
    "data that are not prepared yet": (
        run(**{SOURCE: "data/mine"}), 3,
        "data.sources.a.path: data/mine does not exist (...); make it first: olmo-train prepare-data TEXT --output data/mine "
        "--tokenizer FILE",
    ),
    "no validation data": (
        run(**{SOURCE: "data/one", "data.validation.a.path": "data/one/validation"}), 3,
        "data.validation.a.path: data/one/validation does not exist (...); make it first: olmo-train prepare-data TEXT "
        "--output data/one --tokenizer FILE --validation-fraction 0.05",
    ),
    "data to evaluate on that do not exist": (
        ["evaluate", "runs/done", "--data", "x=nowhere"], 3,
        "--data x: nowhere does not exist (...); make it first: olmo-train prepare-data TEXT --output nowhere --tokenizer FILE",
    ),
    "no tokenizer yet": (
        ["prepare-data", "texts", "--output", "data/new", "--tokenizer", "data/tokenizer.json"], 2,
        "data/tokenizer.json: does not exist; make it first: olmo-train train-tokenizer TEXT --output data/tokenizer.json",
    ),
    "a tokenizer's name": (
        ["prepare-data", "texts", "--output", "data/new", "--tokenizer", "allenai_dolma3"], 2,
        "allenai_dolma3: is neither a tokenizer.json file nor the name of a tokenizer; did you mean 'allenai_dolma2'?",
    ),
    "data of a larger vocabulary": (
        run(**{SOURCE: "data/one", "model.vocab_size": 100}), 3,
        "data/one/meta.json: vocab_size is 300, above the model's; raise model.vocab_size from 100 to at least 300",
    ),
    "damaged data": (
        run(**{SOURCE: "data/damaged"}), 3,
        "data/damaged/tokens-00000.bin: contents changed: ...; copy it again, or prepare the text again into a new folder",
    ),
    "damaged data, prepared again": (
        ["prepare-data", "texts", "--output", "data/damaged", "--tokenizer", "one.json", "--workers", "1"], 3,
        "data/damaged/tokens-00000.bin: contents changed: ...; copy it again, or prepare the text again into a new folder",
    ),
    "a checkpoint for a run": (
        ["checkpoints", "runs/done/checkpoints/step-0000012"], 4,
        "runs/done/checkpoints/step-0000012: is a checkpoint; name its run_dir, runs/done",
    ),
    "curves of a checkpoint": (
        ["curves", "runs/done/checkpoints/step-0000012"], 3,
        "runs/done/checkpoints/step-0000012: is a checkpoint; name its run_dir, runs/done",
    ),
    "replay of a checkpoint": (
        ["replay", "runs/done/checkpoints/step-0000012", "--step", "3"], 2,
        "runs/done/checkpoints/step-0000012: is a checkpoint; name its run_dir, runs/done",
    ),
    "the config.yaml of a run for a run_dir": (
        run(run_dir="runs/done/config.yaml"), 2,
        "run_dir=runs/done/config.yaml: ends in .yaml, so it is read as the name of a file; did you mean 'run_dir=runs/done'?",
    ),
    "data of another vocabulary": (
        run(**{"model.vocab_size": 300}), 3,
        "tokens.npy: token ... set model.vocab_size to at least 512, or name other data",
    ),
    "data of another tokenizer": (
        run(**{SOURCE: "data/one", "data.sources.b.path": "data/two"}), 3,
        "data.sources.b: was made with the tokenizer two.json ... prepare all data with one tokenizer, or allow it with "
        "data.check_tokenizer=false",
    ),
    "empty input": (
        [*PREPARE, "empty.txt"], 3,
        "empty.txt: contains no documents (1 record skipped); name a file or folder with text",
    ),
    "binary input": (
        [*PREPARE, "picture.png"], 3,
        "picture.png: contains no documents (1 record skipped); picture.png: is binary, not text",
    ),
    "input without the text field": (
        [*PREPARE, "fields.jsonl"], 3,
        "fields.jsonl: contains no documents (9 records skipped); ... has no text in a field 'text'; its fields: "
        "content; to read another one, set --text-field content",
    ),
    "batch not divisible": (
        ["plan", *run(global_batch_size=9, micro_batch_size=1)[1:], "--gpus", "2"], 2,
        "global_batch_size: 9 is not a multiple of ...; use 8 or 10",
    ),
    "model too large for the machine": (
        run(**{"model.d_model": 16384, "model.n_layers": 200, "model.mlp_hidden": 65536}), 2,
        "model: the run does not fit: ... of ... available on this machine; use more machines, or a smaller model: ",
    ),
    "heads not dividing d_model": (
        run(**{"model.n_heads": 5}), 2,
        "model.n_heads: 5 does not divide d_model 64; choose a divisor or set model.head_dim",
    ),
    "warmup above steps": (
        run(total_steps=None, total_tokens=5000, **{"optim.warmup_steps": 50}), 2,
        "optim.warmup_steps: 50 fills the whole run of 10 steps: the learning rate never reaches its peak; "
        "set optim.warmup_steps to at most 9",
    ),
    "resume with another learning rate": (
        ["train", *words_of("runs/done", "tokens.npy", **{"optim.peak_lr": 1e-4})], 2,
        "optim.peak_lr: is 0.0001 now and was 0.003 when this run was saved, which would train another model; set it "
        "back, choose another run_dir, or set allow_changes=[optim.peak_lr]",
    ),
    "resume with a learning rate and another name": (
        ["train", *words_of("runs/done", "tokens.npy", **{"optim.peak_lr": 1e-4, "optim.eps": 1e-6})], 2,
        "optim.eps: is 1e-06 now and was 1e-05; optim.peak_lr is 0.0001 now and was 0.003 when this run was saved, which would "
        "train another model; set them back, choose another run_dir, or set allow_changes=[optim.eps,optim.peak_lr]",
    ),
    "resume with other shapes": (
        ["train", *words_of("runs/done", "tokens.npy", **{"model.d_model": 128, "model.n_layers": 3}),
         "allow_changes=[model.d_model]"], 2,
        "model.d_model: is 128 now and was 64; model.n_layers is 3 now and was 2 when this run was saved, which would change "
        "the shape of the weights; set them back, or choose another run_dir",
    ),
    "processes as an option": (
        ["train", "model.yaml", "--gpus", "2"], 2,
        "olmo-train train: unrecognized arguments: --gpus 2; launch/local.sh CONFIG.yaml trains on all GPUs of this machine",
    ),
    "wrong direction": (
        ["convert", "exporthf", "runs/done", "out"], 2,
        "olmo-train convert: argument direction: 'exporthf' is not a choice; did you mean 'export-hf'?",
    ),
    "no run to compare": (
        ["config", "--diff", "runs/done", "runs/nope"], 2,
        "runs/nope: there is no such configuration file; name a YAML file or a run_dir",
    ),
    "a run that was moved": (
        ["train", "runs/moved/config.yaml"], 2,
        "runs/moved/config.yaml: lies in runs/moved, but names run_dir runs/done; add run_dir=runs/moved to continue the "
        "run in runs/moved, or run_dir=NEW to start another one",
    ),
    "branch from a deleted checkpoint": (
        run(resume_from="runs/done/checkpoints/step-0000007"), 4,
        "runs/done/checkpoints/step-0000007: is neither a checkpoint folder nor a run_dir with a checkpoint; "
        "runs/done has the checkpoints of steps 5, 10 and 12; name runs/done for the newest, or a folder such as "
        "runs/done/checkpoints/step-0000012",
    ),
    "run_dir in use": (
        ["train", *words_of("runs/used", "tokens.npy")], 2,
        "run_dir: runs/used is in use by ...; stop it, or choose another run_dir",
    ),
    "read-only run_dir": (
        ["train", *words_of("/proc/new", "tokens.npy")], 2,
        "run_dir: /proc/new cannot be written: ...; choose another run_dir",
    ),
    "prompt without a checkpoint": (
        ["generate", "--prompt", "Once"], 2,
        "olmo-train generate: the following arguments are required: CHECKPOINT; for example: olmo-train generate "
        "runs/first --prompt",
    ),
    "prompt of a run without a checkpoint": (
        ["generate", "runs/used", "--prompt", "Once"], 4,
        "runs/used: is neither a checkpoint folder nor a run_dir with a checkpoint; name a run_dir that has saved one",
    ),
    "wrong metric": (
        ["curves", "runs/done", "--metric", "loss"], 2,
        "--metric: no run has the metric 'loss'; did you mean 'train/CrossEntropyLoss'?",
    ),
}  # fmt: skip


def files() -> list[Path]:
    return sorted(path for path in Path().rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_the_fix(name, place, monkeypatch, capfd):
    from olmo_train.__main__ import main
    from olmo_train.storage import lock_run_dir

    words, code, expected = MISTAKES[name]
    monkeypatch.chdir(place)
    Path("runs/used").mkdir(exist_ok=True)
    before = files()
    capfd.readouterr()
    began = time.monotonic()
    with lock_run_dir(Path("runs/used")):
        try:
            found = main(words)
        except SystemExit as exit:
            found = exit.code
    seconds = time.monotonic() - began
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert "Traceback" not in printed.err and sum(line.startswith("error: ") for line in lines) == 1
    pattern = ".*".join(map(re.escape, expected.split("...")))
    assert found == code and re.fullmatch(f"error: {pattern}.*", lines[-1]), printed.err
    assert seconds < SECONDS
    assert files() == before


def test_a_micro_batch_above_the_batch_is_lowered_with_a_line(place, monkeypatch, capfd):
    from olmo_train.__main__ import main

    monkeypatch.chdir(place)
    assert main(["train", *words_of("runs/lowered", "tokens.npy", micro_batch_size=16, total_steps=5)]) == 0
    assert "micro_batch_size 16 is lowered to 8, which divides the 8 instances of a process" in "".join(capfd.readouterr())


@pytest.mark.parametrize("folder", ["runs/done", "{place}/runs/done", "link", "copies"])
def test_the_config_of_a_run_resumes_it_by_any_path(folder, place, monkeypatch, capfd):
    from olmo_train.__main__ import main

    monkeypatch.chdir(place)
    Path("copies").mkdir(exist_ok=True)
    shutil.copy("runs/done/config.yaml", "copies")  # outside of any run
    if not Path("link").exists():
        Path("link").symlink_to("runs/done")
    assert main(["train", f"{folder.format(place=place)}/config.yaml"]) == 0
    assert "runs/done is finished: 12 of 12 steps" in capfd.readouterr().out


def test_a_moved_run_continues_in_the_run_dir_that_is_named(place, monkeypatch, capfd):
    from olmo_train.__main__ import main

    monkeypatch.chdir(place)
    assert main(["train", "runs/moved/config.yaml", "run_dir=runs/moved"]) == 0
    assert "runs/moved is finished" in capfd.readouterr().out


def test_a_run_past_its_last_step_says_where_it_is(place, monkeypatch, capfd):
    from olmo_train.__main__ import main

    monkeypatch.chdir(place)
    assert main(["train", *words_of("runs/done", "tokens.npy", total_steps=8)]) == 0
    assert "runs/done is at step 12, past total_steps 8; set total_steps higher to continue" in capfd.readouterr().out

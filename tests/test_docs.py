"""The README's commands run as they stand there, on a text of a few kilobytes and for a few steps; its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from data_sources import texts

from olmo_train.commands.train import key_lines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "launch/README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
SHAPE = ["model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.mlp_hidden=64", "model.seq_len=32"]
SMALL = [*SHAPE, "global_batch_size=4", "micro_batch_size=2", "total_steps=2", "optim.warmup_steps=1", "log.wandb.mode=disabled"]


def commands(after: str) -> list[list[str]]:
    """The words of each command in the first code block after a heading, continued lines joined."""
    block = README.split(f"## {after}\n", 1)[1].split("```\n", 2)[1]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.fixture
def clone(tmp_path):
    """The working directory looks like the repository, with a text of one's own in it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my-text").mkdir()
    for name in range(40):
        (tmp_path / "my-text" / f"{name}.txt").write_text(f"Once there was a king of {name} castles. " * 40)


def test_the_commands_for_ones_own_model_run(clone, run_main):
    for program, verb, *words in commands("Your own model"):
        assert program == ".venv/bin/olmo-train"
        if verb == "train-tokenizer":
            words[words.index("--vocab-size") + 1] = "300"
        elif verb in ("train", "plan"):
            words += SMALL
        elif verb == "inspect-data":
            words[words.index("--step") + 1] = "2"
        elif verb == "generate":
            words += ["--max-new-tokens", "4"]
        done = run_main(verb, *words)
        assert done.returncode == 0, f"{verb}: {done.stderr}"
        assert done.stdout or verb in ("train-tokenizer", "prepare-data"), f"{verb} says nothing"


def test_the_torchrun_command_runs(clone, run_cli, tmp_path, tiny_tokens):
    (words,) = commands("Eight GPUs, many nodes")
    (tmp_path / "my-data.yaml").write_text(f"data: {{sources: {{mine: {{path: {tiny_tokens}}}}}}}\n")
    assert words[:5] == ["torchrun", "--standalone", "--nproc-per-node=8", "-m", "olmo_train"]
    done = run_cli(*words[5:], *SMALL, nproc=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/olmo-1b/checkpoints/step-0000002/MANIFEST.json").exists()


def test_the_five_commands_of_the_data_page_bring_text_to_a_run(tmp_path, run_main):
    page = (ROOT / "docs/data.md").read_text("utf-8")
    block = lambda language: re.search(rf"```{language}\n(.*?)```", page, re.S).group(1)  # noqa: E731
    (tmp_path / "my-text").mkdir()
    for i, text in enumerate(texts(300)):
        (tmp_path / "my-text" / f"{i:03d}.txt").write_text(text * 10)
    (tmp_path / "my-run.yaml").write_text(block("yaml"))
    few = ["total_steps=2", "global_batch_size=2", "micro_batch_size=2", "log.wandb.mode=disabled", "parallel.precision=fp32"]
    commands = [shlex.split(line)[1:] for line in block("sh").splitlines()]
    assert len(commands) == 5
    for words in commands:
        done = run_main(*words, *(few if words[0] == "train" else []))  # two steps stand for its thousand
        assert done.returncode == 0, (words, done.stderr)
    assert "my-text/" in done.stdout
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").exists()


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: the headings, as a Git host turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", (ROOT / page).read_text("utf-8")):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_the_modules_that_a_page_names_exist(page):
    """By a path below the repository or the package, or by a file name that some folder has."""
    files = {f"/{path.relative_to(ROOT)}" for top in ("olmo_train", "tests", "launch") for path in (ROOT / top).rglob("*.*")}
    for name in re.findall(r"[\w/]+\.(?:py|cpp)\b", (ROOT / page).read_text("utf-8")):
        assert any(file.endswith(f"/{name.lstrip('/')}") for file in files), f"{page} names {name}"


def test_the_architecture_page_names_what_its_files_have():
    """In "Where to put a new thing": NORMS, StepStats and the like are in one of the files of their row."""
    rows = (ROOT / "docs/architecture.md").read_text("utf-8").split("## Where to put a new thing")[1].splitlines()
    checked = 0
    for row in rows:
        code = "".join((ROOT / "olmo_train" / file).read_text("utf-8") for file in re.findall(r"`(\w[\w/]*\.py)`", row))
        for name in re.findall(r"\b[A-Z]{4,}\b|\b[A-Z][a-z]+[A-Z]\w*|\b[a-z]+_of\b", row) if code else []:
            assert re.search(rf"^(class |def )?{name}\b", code, re.M), f"{name} is not in the files of: {row}"
            checked += 1
    assert checked >= 8


def test_the_configuration_page_has_the_keys_as_the_command_prints_them():
    block = (ROOT / "docs/configuration.md").read_text("utf-8").split("## All keys\n", 1)[1].split("```\n")[1]
    assert block.splitlines() == "\n".join(key_lines("", width=80)).splitlines(), "paste the output of: olmo-train train --keys"


def test_the_tests_that_the_readme_names_exist():
    named = set(re.findall(r"tests/test_\w+\.py", README))
    assert len(named) > 8 and all((ROOT / name).is_file() for name in named)

"""The code blocks of the pages run as they are printed, in the order in which a reader meets them; links lead somewhere.

All blocks run in one working folder: a `sh` block line by line, a `yaml` block is written to the file that its first line
names, `python` blocks of a page share their variables, and `text` is only read. A command whose comment says `needs ...` does
not run here; NEEDS lists them all. A comment line `# needs ...` holds for the rest of its block.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from data_sources import texts
from runs import first_quick

from olmo_train.__main__ import main
from olmo_train.commands.train import key_lines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "launch/README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
SHAPE = ["model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.mlp_hidden=64", "model.seq_len=32"]
SMALL = [*SHAPE, "global_batch_size=4", "micro_batch_size=2", "total_steps=2", "optim.warmup_steps=1", "log.wandb.mode=disabled"]

FIRST = ["README.md", "docs/data.md"]  # make what the other pages use: my-data.yaml, my-run.yaml, runs/mine and runs/text
WITH_BLOCKS = FIRST + [page for page in PAGES if page not in FIRST and "```" in (ROOT / page).read_text("utf-8")]
SHORTER = {"total_steps=200": "total_steps=30", "total_steps: 300": "total_steps: 40", "total_steps: 100": "total_steps: 20"}
NEEDS = {
    "launch/README.md": ["8 GPUs", *["several machines with 8 GPUs"] * 2],
    "README.md": ["a network the first time, for Python packages", "ten minutes", "8 GPUs", "a cluster with Slurm"],
    "CONTRIBUTING.md": ["a network the first time; style, types, import rules"],
    "docs/architectures.md": ["a GPU", *["a checkpoint and a configuration file of allenai/OLMo"] * 2],
    "docs/benchmarks.md": ["a GPU"] * 3,
    "docs/configuration.md": ["a GPU"],
    "docs/finetuning.md": ["a network the first time"],
    "docs/ladder.md": ["hours", "the run that was forecast"],
    "docs/evaluation.md": ["OLMo's task files", "a network the first time", "8 GPUs"],
    "docs/training.md": ["ten minutes", "the runs; a hue per choice, a band over seeds"],
    "docs/curves.md": ["Ctrl-C to end; a live page on this computer", "a file exported from W&B"],
}


def blocks(page: str) -> list[tuple[int, str, str]]:
    """(line, language, text) of each fenced block."""
    text = (ROOT / page).read_text("utf-8")
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M)
    return [(text[: block.start()].count("\n") + 2, block[1], block[2]) for block in found]


def commands(text: str) -> list[tuple[str, str]]:
    """(command, what it needs or "") of each command of a sh block, continued lines joined."""
    found, whole_block = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        need = line.split("# needs ", 1)[1] if "# needs " in line else ""
        if line.startswith("#"):
            whole_block = need or whole_block
        elif line:
            found.append((line, need or whole_block))
    return found


def all_commands(page: str) -> list[tuple[str, str]]:
    return [found for _, language, text in blocks(page) if language == "sh" for found in commands(text)]


class Reader:
    """A folder that looks like a clone with texts in it, and the pages that were followed there so far."""

    def __init__(self, folder: Path):
        self.folder, self.followed = folder, set()
        for name in ("configs", "launch", "tests", "olmo_train"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "my-text").mkdir()
        for i, text in enumerate(texts(300)):
            (folder / "my-text" / f"{i:03d}.txt").write_text(f"Once {text} " * 10, "utf-8")

    def follow(self, page: str) -> None:
        variables = {"__name__": "__main__"}
        for line, language, text in blocks(page):
            for printed, shorter in SHORTER.items():
                text = text.replace(printed, shorter)
            if language == "yaml":
                (self.folder / text.split("\n", 1)[0].removeprefix("# ")).write_text(text, "utf-8")
            elif language == "python":
                exec(compile("\n" * (line - 1) + text, page, "exec"), variables)
            elif language == "sh":
                for command, need in commands(text):
                    if not need:
                        assert self.run(command) == 0, f"{page}:{line}: {command}"
            else:
                assert language == "text", f"{page}:{line}: a block of sh, yaml, python or text, not {language!r}"
        self.followed.add(page)

    def run(self, command: str) -> int:
        """The exit code; olmo-train runs in this process, which saves seconds of imports each time."""
        program, *words = shlex.split(command, comments=True)
        if program == "olmo-train":
            try:
                return main(words)
            except SystemExit as exit:
                return exit.code or 0
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        return subprocess.run(["bash", "-c", command], cwd=self.folder, env=environment, timeout=300).returncode


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return Reader(tmp_path_factory.mktemp("clone"))


@pytest.mark.parametrize("page", first_quick(WITH_BLOCKS, len(FIRST)))
def test_the_code_blocks_of_a_page_run_as_they_are_printed(reader, page, monkeypatch):
    monkeypatch.chdir(reader.folder)
    for each in dict.fromkeys([*FIRST, page]):
        if each not in reader.followed:
            reader.follow(each)


def test_the_commands_that_need_more_than_this_machine_are_known():
    needs = {page: [need for _, need in all_commands(page) if need] for page in WITH_BLOCKS}
    assert {page: found for page, found in needs.items() if found} == NEEDS


def test_a_command_that_fails_and_a_block_of_another_kind_are_found(reader, monkeypatch, tmp_path):
    monkeypatch.chdir(reader.folder)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for block in ("```sh\nolmo-train curves runs/none", "```sh\nfalse", "```\nplain", "```python\nassert 0"):
        (tmp_path / "page.md").write_text(f"# Page\n\n{block}\n```\n")
        with pytest.raises(AssertionError):
            reader.follow("page.md")


def test_the_torchrun_command_runs(run_cli, tmp_path, tiny_tokens):
    """The README's, with two processes and a small model."""
    (words,) = [shlex.split(command) for command, _ in all_commands("README.md") if command.startswith("torchrun")]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my-data.yaml").write_text(f"data: {{sources: {{mine: {{path: {tiny_tokens}}}}}}}\n")
    assert words[:5] == ["torchrun", "--standalone", "--nproc-per-node=8", "-m", "olmo_train"]
    done = run_cli(*words[5:], *SMALL, nproc=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/olmo-1b/checkpoints/step-0000002/MANIFEST.json").exists()


def test_readme_links_every_page():
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", README))
    assert {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")} - {"docs/LOG.md"} <= linked
    assert {"launch/README.md", "CONTRIBUTING.md"} <= linked


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
    text = (ROOT / page).read_text("utf-8").split("## Comparison with other frameworks")[0]  # which names files of others
    for name in re.findall(r"[\w/]+\.(?:py|cpp)\b", text):
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
    _, block, after = (ROOT / "docs/configuration.md").read_text("utf-8").split("## All keys\n", 1)[1].split("```")
    assert not after.strip(), "the page ends with the list"
    assert block.removeprefix("text\n").splitlines() == "\n".join(key_lines("", width=80)).splitlines(), (
        "paste the output of: olmo-train train --keys"
    )


def test_the_tests_that_the_readme_names_exist():
    named = set(re.findall(r"tests/test_\w+\.py", README))
    assert len(named) > 8 and all((ROOT / name).is_file() for name in named)

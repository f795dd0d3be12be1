"""Text of the user (data, names, paths, prompts) is printed and read literally, though a library would interpret it."""

import ast
import io
import re
import sys
from pathlib import Path

import pytest
import torch

import olmo_train
from olmo_train.__main__ import main
from olmo_train.commands.common import print_table, watch
from olmo_train.errors import reason
from olmo_train.log.console import Console
from olmo_train.model.generate import Sampling, choose

ODD = ("[/INST] [link] :smile:", "a[/b]", "lr[red]", "[bold]x[/bold]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


@pytest.mark.parametrize("text", ODD)
def test_tables_and_the_bars_show_the_users_text_as_it_is(monkeypatch, text):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_table((text, "b"), [(text, "1"), ("x\x1b[31my", "2")])
    console = Console(text, 0, 3)
    console.say(f"says {text}")
    console.log(1, {f"eval/{text}/CrossEntropyLoss": 1.0})
    console.step(2)
    console.close()
    out = shown(terminal)
    assert out.count(text) >= 5 and "x\ufffd[31my" in out
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(watch([1, 2], text, 2)) == [1, 2] and text in shown(terminal)


def test_a_plan_shows_its_run_dir_and_sources_as_they_are(tiny_words, tiny_tokens, capsys):
    words = tiny_words(**{"run_dir": "runs/a[/b]", "data.sources.s[/b].path": tiny_tokens})
    assert main(["plan", *words, "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "runs/a[/b]: 1 x" in out and "s[/b]" in out and "Fits: " in out and "[bold]" not in out


def test_only_console_makes_a_console_of_rich():
    for file in Path(olmo_train.__file__).parent.rglob("*.py"):
        makers = re.findall(r"\b(?:rich import print|rich\.print|track\(|(?<!rich_)Console\()", file.read_text())
        allowed = {"console.py": ["Console("], "run_logger.py": ["Console("], "common.py": ["track("]}
        assert makers in ([], allowed.get(file.name)), file


def test_no_message_shows_the_number_of_an_error_of_the_system():
    """Nor the path again, which Python adds to it: `reason` returns what happened alone."""
    assert reason(OSError(30, "Read-only file system", "ro/.nb.tmp")) == "Read-only file system"
    assert reason(OSError("two\nlines")) == "two lines" and reason(EOFError()) == "EOFError"
    for file in Path(olmo_train.__file__).parent.rglob("*.py"):
        for handler in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(handler, ast.ExceptHandler) and handler.name and "OSError" in ast.unparse(handler.type):
                shown = [ast.unparse(part.value) for part in ast.walk(handler) if isinstance(part, ast.FormattedValue)]
                warnings = [
                    call for call in ast.walk(handler) if isinstance(call, ast.Call) and ast.unparse(call.func) == "log.warning"
                ]
                shown += [ast.unparse(part) for call in warnings for part in call.args]
                assert handler.name not in shown, (file, handler.lineno)


def test_train_tokenizer_says_of_each_file_what_prepare_data_says(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("texts/deeper").mkdir(parents=True)
    for i in range(3):
        Path(f"texts/{i}.txt").write_text("the sun and the moon " * 9)
    Path("texts/rows.jsonl").write_text('{"text": "one"}\n')
    Path("texts/.hidden").write_text("x")
    Path("texts/loop").symlink_to("deeper/..")
    Path("texts/bad.txt").write_bytes(b"\xff\xff")
    assert main(["train-tokenizer", "texts", "--output", "t.json", "--vocab-size", "300"]) == 0
    done = capfd.readouterr()
    assert main(["prepare-data", "texts", "--output", "data", "--tokenizer", "t.json", "--workers", "1"]) == 0
    of_prepare = capfd.readouterr().err.splitlines()
    warned = done.err.splitlines()
    assert warned == of_prepare and len(warned) == 3
    assert any(line.endswith("is a link to a folder that is read; it is read once") for line in warned)
    assert any(line.endswith("bad.txt: is not UTF-8 (byte 0); left out") for line in warned)
    assert "left out: 1 file: a name that begins with a dot\n" in done.out and "left out: 1 record: is not UTF-8\n" in done.out


def parsed(monkeypatch, *words):
    """What the module of a verb is called with."""
    from olmo_train.commands import generate

    seen = []
    monkeypatch.setattr(generate, "run", seen.append)
    assert main(["generate", "r", *words]) == 0
    return seen[0]


def test_an_option_that_takes_text_takes_the_next_word_as_it_is(monkeypatch):
    args = parsed(monkeypatch, "--prompt", "-x", "--prompt", "--json", "--stop", "--x", "--prompt", "", "--json", "--seed", "-1")
    assert (args.prompt, args.stop, args.json, args.seed) == (["-x", "--json", ""], ["--x"], True, -1)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--stop", ""], "error: --stop: is empty"),
        (["--seed", "9" * 20], "error: --seed: must lie between -2^63 and 2^63 - 1, got 9"),
        (["--prompt"], "error: olmo-train generate: argument --prompt: expected one argument"),
    ],
)
def test_what_generate_cannot_use_is_refused(capsys, words, message):
    try:
        code = main(["generate", "nowhere", *words])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-5e3, -4e3, -6e3]])
    for temperature in (1e-320, 1e-12):
        assert choose(logits, Sampling(temperature), torch.tensor([0.0, 0.999])).tolist() == [1, 1]


def test_a_source_is_measured_under_one_name():
    from argparse import Namespace

    from olmo_train.commands.evaluate import _sources
    from olmo_train.errors import ConfigError

    with pytest.raises(ConfigError, match="--data: names a source twice: m=a m=b"):
        _sources(512, Path("r"), None, Namespace(data=["m=a", "m=b"]))

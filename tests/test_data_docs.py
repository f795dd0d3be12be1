"""docs/data.md: its five commands bring a folder of text to a run, as they are written there."""

import re
import shlex
from pathlib import Path

from data_sources import texts

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.S).group(1)


def test_the_five_commands_bring_text_to_a_run(tmp_path, run_cli):
    (tmp_path / "my-text").mkdir()
    for i, text in enumerate(texts(300)):
        (tmp_path / "my-text" / f"{i:03d}.txt").write_text(text * 10)
    (tmp_path / "my-run.yaml").write_text(block("yaml"))
    commands = [shlex.split(line)[1:] for line in block("sh").splitlines()]
    assert len(commands) == 5
    for words in commands:
        if words[0] == "train":  # two steps stand for its thousand
            words += [
                "total_steps=2",
                "global_batch_size=2",
                "micro_batch_size=2",
                "log.wandb.mode=disabled",
                "parallel.precision=fp32",
            ]
        done = run_cli(*words)
        assert done.returncode == 0, (words, done.stderr)
    assert "my-text/" in done.stdout
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").exists()

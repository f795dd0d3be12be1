"""A run that was killed and resumed can be audited: any of its steps, computed again, is equal to the last bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmo_train.replay import logged_lines, replay

STEPS, AUDITED = 60, 20
ENDS = ((13, signal.SIGKILL), (29, signal.SIGTERM), (44, signal.SIGKILL))  # (logged lines, what comes then)


def train_until(words: list[str], run_dir: Path, lines: int, number: int) -> int:
    """Train in a process of its own that gets the signal once so many lines are logged; its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "olmo_train", "train", *words], stdout=subprocess.DEVNULL)
    try:
        metrics = run_dir / "metrics.jsonl"
        while process.poll() is None and (not metrics.is_file() or metrics.read_text().count("\n") < lines):
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(timeout=300)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_twenty_random_steps_of_a_run_with_resumes_are_equal_bit_for_bit(tiny_words, run_cli, tmp_path):
    run_dir = tmp_path / "run"
    words = tiny_words("run", total_steps=STEPS, **{"checkpoint.interval_steps": 7})
    assert [train_until(words, run_dir, *end) for end in ENDS] == [-signal.SIGKILL, 75, -signal.SIGKILL]
    assert (done := run_cli("train", *words)).returncode == 0, done.stderr
    lines = logged_lines(run_dir)
    assert list(lines) == list(range(1, STEPS + 1)) and {line["attempt"] for line in lines.values()} == {1, 2, 3, 4}
    assert (
        len([event for event in (run_dir / "events.jsonl").read_text().splitlines() if json.loads(event)["event"] == "resume"])
        == 3
    )
    audited = random.Random(1).sample(range(1, STEPS + 1), AUDITED)
    assert {result.step: result.differing for result in (replay(run_dir, step) for step in audited)} == dict.fromkeys(audited, [])

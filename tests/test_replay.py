"""A run that was killed and resumed can be audited: any of its steps, computed again, is equal to the last bit."""

import os
import random
import signal
from pathlib import Path

import pytest
from ranks import exit_code, fork
from runs import events_of, wait_for

from olmo_train.__main__ import main
from olmo_train.checkpoint.folders import committed
from olmo_train.data.loader import IGNORE, read_batch
from olmo_train.guards.forensics import scored_tokens
from olmo_train.history import History
from olmo_train.tools.replay import logged_lines, replay
from olmo_train.train import train

STEPS, AUDITED = 60, 20
ENDS = ((13, signal.SIGKILL), (29, signal.SIGTERM), (44, signal.SIGKILL))  # (logged lines, what comes then)


def train_until(words: list[str], run_dir: Path, lines: int, number: int) -> int:
    """Train in another process that gets the signal once this many lines are logged; its exit code."""
    pid = fork(lambda: main(["train", *words]), os.devnull)
    wait_for(run_dir, lines)
    os.kill(pid, number)
    return exit_code(pid)


def test_a_lengthened_run_is_computed_again_with_the_configuration_of_each_attempt(tiny_args, capsys):
    once = {"checkpoint.interval_steps": 100, "checkpoint.keep_last": 1}
    list(train(tiny_args("run", total_steps=6, **{**once, "log.interval_steps": 4})))
    smaller = {"global_batch_size": 4, "allow_changes": "[global_batch_size]", "log.interval_steps": 3}
    list(train(tiny_args("run", total_steps=12, **{**once, **smaller})))
    run_dir = Path(tiny_args("run").run_dir)
    assert list(committed(run_dir)) == [12]  # so that a replay begins with the initial weights
    capsys.readouterr()
    said, watched = [], []
    result = replay(run_dir, 9, said.append, lambda steps, what, total: watched.append(total) or steps)
    assert watched == [6, 3] and capsys.readouterr().out == ""  # train's lines would estimate the time of all 12 steps
    assert result.step == 9 and result.differing == [] and len(result.sequences) == 4
    assert "computing 9 steps, 1 to 9, from the initial weights: about" in said[0] and "changed after step 6" in said[0]
    assert replay(run_dir, 5).differing == []


@pytest.mark.parametrize("order", ["permute", "olmo"])
def test_the_losses_of_the_sequences_are_means_over_their_scored_tokens(tiny_args, order):
    words = {"data.order": order, "data.eos_id": 511, "data.deny": "[a:@100,a:@7000,a:@15000,a:@30000]", "total_steps": 3}
    config = tiny_args("run", **words, micro_batch_size=8, global_batch_size=160)
    *_, last = train(config)
    mixture = History(Path(config.run_dir)).attempt_of(3).mixture()
    scored = (read_batch(mixture, 3, 0, 1).labels != IGNORE).sum(dim=1).tolist()
    assert scored_tokens(mixture, 3) == scored and min(scored) < 64
    batch, result = mixture.global_batch(3), replay(Path(config.run_dir), 3)
    tokens = {("a", instance): n for instance, n in zip(batch.instance.tolist(), scored, strict=True)}
    total = sum(loss * tokens[source, instance] for source, instance, loss in result.sequences)
    assert total / sum(scored) == pytest.approx(last.loss.item(), rel=1e-6)
    losses = [loss for *_, loss in result.sequences]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_twenty_random_steps_of_a_run_with_resumes_are_equal_bit_for_bit(tiny_words, tmp_path):
    run_dir = tmp_path / "run"
    words = tiny_words("run", total_steps=STEPS, **{"checkpoint.interval_steps": 7})
    assert [train_until(words, run_dir, *end) for end in ENDS] == [-signal.SIGKILL, 75, -signal.SIGKILL]
    assert main(["train", *words]) == 0
    lines = logged_lines(run_dir)
    assert list(lines) == list(range(1, STEPS + 1)) and {line["attempt"] for line in lines.values()} == {1, 2, 3, 4}
    assert len(events_of(run_dir, "resume")) == 3
    audited = random.Random(1).sample(range(1, STEPS + 1), AUDITED)
    assert {result.step: result.differing for result in (replay(run_dir, step) for step in audited)} == dict.fromkeys(audited, [])

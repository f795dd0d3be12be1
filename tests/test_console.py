"""What a run shows: one bar in a terminal with the lines worth keeping above it, plain lines elsewhere."""

import io
import sys

import pytest
from test_users_text import Terminal, shown

from olmo_train.formats import counted
from olmo_train.log import console as module
from olmo_train.log.console import Console, rich_console

LONG_NAME = "runs/2026-11-25-speeches-lr3e-3-seed1"


def line_of(loss: float) -> dict[str, float]:
    figures = {"optim/learning_rate_group0": 2.1e-3, "optim/total_grad_norm": 0.84, "throughput/tokens_per_second": 12_300}
    return {"train/CrossEntropyLoss": loss, "skipped": 0, **figures}


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the console sees, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def run(console: Console, clock: list[float], steps: int, step_seconds: float, interval: int = 10) -> Console:
    for step in range(1, steps + 1):
        clock[0] += step_seconds
        console.step(step)
        if step % interval == 0:
            console.log(step, line_of(4.8123))
    return console


def bar(console: Console, width: int) -> str:
    rich_console(file=(out := io.StringIO()), width=width).print(console, end="")
    return out.getvalue().rstrip("\n")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_step_time_left_and_loss_are_in_the_bar_whatever_the_runs_name(clock, width):
    text = bar(run(Console(LONG_NAME, 0, 100_000), clock, 1230, 0.5), width)
    assert "1230/100000  left 13.6 h  loss 4.8123" in text and len(text) <= width and "\n" not in text
    assert ("\u2501" * 10 in text) == (width >= 60) and (LONG_NAME in text) == (width >= 200)


@pytest.mark.parametrize(
    "step_seconds, kept", [(0.01, range(50, 1001, 50)), (1.0, range(30, 1001, 30)), (60.0, range(10, 1001, 10))]
)
def test_a_terminal_keeps_a_line_of_losses_every_30_seconds_or_twentieth_of_the_run(clock, monkeypatch, step_seconds, kept):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())  # pytest replaces what a fixture sets
    run(Console("run", 0, 1000), clock, 1000, step_seconds).close()
    lines = [line for line in shown(terminal).splitlines() if line.startswith("step ")]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == sorted({*kept, 1000})


def test_plain_output_keeps_each_line(clock, capsys):
    run(Console("run", 0, 1000), clock, 1000, 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100
    assert lines[49] == "step  500/1000  loss 4.8123  lr 2.10e-03  grad 0.84  12.3k tokens/s  left 5 s"


@pytest.mark.parametrize("resumed_at", [0, 198, 199])
def test_the_time_left_is_that_of_the_other_steps_and_evaluations(clock, resumed_at):
    """400 steps of 1 s and, every 100 steps, an evaluation of 60 s."""
    console = Console("run", resumed_at, 400, eval_steps=100)
    for step in range(resumed_at + 1, 202):
        clock[0] += 1
        console.step(step)
        if step % 100 == 0:
            clock[0] += 60
            console.log(step, line_of(4.8123) | {"eval/web/CrossEntropyLoss": 5.0})
        if step == 200:
            assert console.left() == ([] if resumed_at == 199 else ["left 5.3 min"])  # 200 steps and 2 evaluations
    assert console.left() == ["left 5.3 min"]
    clock[0] += 1000  # a slow save, which does not bring the end nearer
    assert console.left() == ["left 5.3 min"]


@pytest.mark.parametrize(
    "first, second, compiled, lines",
    [
        (270.0, 250.0, False, ["the first step took 4.5 min; loss 8.3000; at this speed the other 999 steps take 3.1 days"]),
        (1.8, 0.05, False, ["the first step took 1.8 s; loss 8.3000",
                            "the second step took 0.05 s; at this speed the other 998 steps take 50 s"]),
        (90.0, 0.5, True, ["the first step took 90 s, including torch.compile; loss 8.3000",
                           "the second step took 0.5 s; at this speed the other 998 steps take 8.3 min"]),
    ],
)  # fmt: skip
def test_the_first_steps_say_how_long_the_run_takes(capsys, first, second, compiled, lines):
    console = Console("run", 0, 1000)
    for step, seconds in ((1, first), (2, second)):
        console.step(step)
        console.early(seconds, 8.3, compiled)
    assert capsys.readouterr().out.splitlines() == lines


def test_the_end_names_time_losses_places_and_next_commands(clock, capsys, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    console = run(Console("runs/my run", 0, 20), clock, 20, 10.0)
    console.log(20, {"eval/web/CrossEntropyLoss": 5.25})
    capsys.readouterr()
    console.finish(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "finished after 3.3 min: 20 steps, loss 4.8123, validation loss web 5.2500",
        f"  checkpoint  {tmp_path}",
        "  metrics     runs/my run/metrics.jsonl",
        "  curves      olmo-train curves 'runs/my run'",
        "  text        olmo-train generate 'runs/my run' --prompt TEXT",
    ]


def test_the_end_of_a_run_on_conversations_names_their_template(capsys, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"template": {"name": "chatml"}}')
    Console("runs/chat", 0, 20).finish(tmp_path)
    assert "olmo-train generate runs/chat --template chatml --prompt TEXT" in capsys.readouterr().out


def test_a_count_has_its_noun_in_the_right_number():
    assert [counted(n, noun) for n, noun in ((1, "shard"), (0, "step"), (2, "process"), (2000, "GPU"))] == [
        "1 shard", "0 steps", "2 processes", "2,000 GPUs"]  # fmt: skip

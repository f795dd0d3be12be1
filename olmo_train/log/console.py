"""Console output of a run: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from olmo_train.formats import counted, duration, rounded, short

if TYPE_CHECKING:
    import rich.console
    from rich.text import Text

LONG_SECONDS = 60  # of a first step from which the time of the run is estimated; else the second step is
KEPT_SECONDS, KEPT_SHARE = 30, 1 / 20  # a terminal keeps a line of losses after N seconds or this share of the run
BAR_WIDTH = 10, 40  # characters: it is left out below the first


def is_terminal(stream: IO[str]) -> bool:
    """Whether the stream is a terminal that can redraw a line; not with TERM=dumb."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def has_color() -> bool:
    """Whether to print colours to stdout. NO_COLOR and FORCE_COLOR take precedence (no-color.org, force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_terminal(sys.stdout)


def rich_console(**options: Any) -> Any:
    """rich's Console for text that may be a user's: brackets and :codes: are shown as they are, and bold is a style."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


class Console:
    """Shows a run, on rank 0: in a terminal one bar below the lines worth keeping, elsewhere a line for each line of metrics."""

    def __init__(self, run_dir: str, first_step: int, total_steps: int, eval_steps: int = 10**9):
        """`first_step`: the last step before this start; `eval_steps`: the run evaluates every N steps and at its end."""
        self.run_dir, self.first_step, self.total_steps, self.eval_steps = run_dir, first_step, total_steps, eval_steps
        self.last_step, self.started = first_step, time.perf_counter()
        self._warm: float | None = None  # when the first step ended, which is slower than the others
        # when the last step ended, and the mean of steps without evaluations
        self._ended, self._step_seconds = self.started, 0.0
        self._evaluation, self._evaluated = 0.0, 0.0  # seconds of the last evaluation, and of all since the first step
        self._kept = (first_step, self.started)  # step and time of the last line of losses
        self._loss, self._losses, self._figures = "", "", [""]  # in training, in validation, and the other figures, as text
        self._estimated, self._live = False, None
        if is_terminal(sys.stdout):
            from rich.live import Live

            self._live = Live(self, console=rich_console())
            self._live.start()

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._live is not None:
            self._live.console.print(text)
            return
        try:
            print(text, flush=True)
        except OSError:  # the reader is gone (`| head`) or its disk is full: training continues without output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def step(self, step: int) -> None:
        """A step is done."""
        self._ended, self.last_step = time.perf_counter(), step
        if self._warm is None:
            self._warm, self._evaluated = self._ended, 0.0
        elif (timed := step - self.first_step - 1) > 0:
            self._step_seconds = (self._ended - self._warm - self._evaluated) / timed

    def early(self, seconds: float, loss: float, compiled: bool) -> None:
        """The first or the second step is done, after `seconds`. The first is slower than the others, so it makes the estimate
        for the run only if it is long."""
        is_first, others = self.last_step == self.first_step + 1, self.total_steps - self.last_step
        text = f"the {'first' if is_first else 'second'} step took {duration(rounded(seconds))}"
        if is_first:
            self._loss, self._estimated = loss_text(loss), seconds > LONG_SECONDS and not compiled
            text += f"{', including torch.compile' * compiled}; {self._loss}"
        if others and self._estimated == is_first:
            text += f"; at this speed the other {counted(others, 'step')} take {duration(rounded(others * seconds))}"
        if is_first or not self._estimated:
            self.say(text)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """A line of metrics."""
        if any(key.startswith("eval/") for key in metrics):
            self._evaluation = time.perf_counter() - self._ended
            self._evaluated += self._evaluation
        if "train/CrossEntropyLoss" in metrics:
            self._loss, self._figures = loss_text(metrics["train/CrossEntropyLoss"]), other_figures(metrics)
            kept_step, kept_at = self._kept
            few = time.perf_counter() - kept_at < KEPT_SECONDS and step - kept_step < KEPT_SHARE * self.total_steps
            if self._live is None or not few or step == self.total_steps:
                self._kept = step, time.perf_counter()
                self.say("  ".join([f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", self._loss,
                                    *self._figures, *self.left()]))  # fmt: skip
        losses = {
            key.removeprefix("eval/").removesuffix("/CrossEntropyLoss"): value
            for key, value in metrics.items()
            if key.startswith("eval/") and key.endswith("/CrossEntropyLoss")
        }
        if losses:
            self._losses = "validation loss " + "  ".join(f"{label} {loss:.4f}" for label, loss in losses.items())
            self.say(f"step {step} {self._losses}")

    def left(self) -> list[str]:
        """`left 12.5 min`, or nothing before the second step and after the last."""
        if not self._step_seconds or self.last_step == self.total_steps:
            return []
        evaluations = -(-self.total_steps // self.eval_steps) - self.last_step // self.eval_steps
        in_step = min(time.perf_counter() - self._ended, self._step_seconds)  # evaluating and saving count down nothing
        seconds = (self.total_steps - self.last_step) * self._step_seconds - in_step + evaluations * self._evaluation
        return [f"left {duration(rounded(seconds))}"]

    def finish(self, checkpoint: Path) -> None:
        """The run is done: remove the bar, and print how the run ended, where its files are, and what to do next."""
        if self._live is not None:
            self._live.transient = True
            self.close()
            self._live = None
        took, steps, run_dir = time.perf_counter() - self.started, counted(self.last_step, "step"), shlex.quote(self.run_dir)
        self.say(", ".join(filter(None, [f"finished after {duration(rounded(took))}: {steps}", self._loss, self._losses])))
        self.say(f"  checkpoint  {checkpoint}\n  metrics     {Path(self.run_dir) / 'metrics.jsonl'}")
        self.say(f"  curves      olmo-train curves {run_dir}")
        if (checkpoint / "tokenizer.json").is_file():
            from olmo_train.data.templates import recorded_template

            template = recorded_template(checkpoint)  # a prompt without it looks like none that was trained on
            chosen = f" --template {template['name']}" if template else ""
            self.say(f"  text        olmo-train generate {run_dir}{chosen} --prompt TEXT")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: rich.console.Console, options: rich.console.ConsoleOptions) -> Iterator[Text]:
        """The bar. Step, time left and loss always fit; the run's name, the bar itself and other figures as there is room."""
        from rich.text import Text

        room = options.max_width - BAR_WIDTH[0] - 2
        parts = [f"{self.last_step}/{self.total_steps}", *self.left(), *filter(None, [self._loss])]
        for figure in self._figures:
            if len("  ".join([*parts, figure])) <= room:
                parts.append(figure)
        line = "  ".join(parts)
        name = f"{self.run_dir}  " if len(f"{self.run_dir}  {line}") <= room else ""
        width = min(BAR_WIDTH[1], options.max_width - len(f"{name}  {line}"))
        done = round(width * self.last_step / self.total_steps)
        dash = "-" if options.ascii_only else "\u2501"
        bar = [(dash * done, "bar.complete"), (dash * (width - done), "bar.back"), "  "] if width >= BAR_WIDTH[0] else []
        yield Text.assemble((name, "bold"), *bar, line, no_wrap=True, overflow="ellipsis")


def loss_text(loss: float) -> str:
    """`loss 3.2145`; `loss -` if no step of the interval has a loss, which is NaN then."""
    return "loss -" if math.isnan(loss) else f"loss {loss:.4f}"


def other_figures(metrics: dict[str, Any]) -> list[str]:
    """`lr 2.1e-03`, `grad 0.84`, `12.3k tokens/s`, and the number of skipped steps if there are any."""
    parts = [
        f"lr {metrics['optim/learning_rate_group0']:.2e}",
        f"grad {metrics['optim/total_grad_norm']:.2f}",
        f"{short(metrics['throughput/tokens_per_second'])} tokens/s",
    ]
    if metrics.get("throughput/mfu"):
        parts.append(f"mfu {metrics['throughput/mfu']:.1%}")
    if metrics["skipped"]:
        parts.append(f"skipped {metrics['skipped']}")
    return parts

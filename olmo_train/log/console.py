"""Console output of a run: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import IO, Any

from olmo_train.formats import duration, short


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
    """Shows each logged line. Made on rank 0 only."""

    def __init__(self, run_dir: str, first_step: int, total_steps: int):
        self.total_steps, self.first_step, self.started = total_steps, first_step, time.perf_counter()
        self.progress = None
        if is_terminal(sys.stdout):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[now]}", markup=False),
            ]
            self.progress = Progress(*columns, console=rich_console())
            self.task = self.progress.add_task(run_dir, completed=first_step, total=total_steps, now="")
            self.progress.start()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.progress is not None:
            self.progress.console.print(text)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError:  # the reader is gone (`| head`) or its disk is full: training continues without output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def step(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if "train/CrossEntropyLoss" in metrics:
            line = train_line(metrics)
            left = (time.perf_counter() - self.started) / max(step - self.first_step, 1) * (self.total_steps - step)
            if self.progress is not None:
                self.progress.update(self.task, now=line)
            else:
                self._print(f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {line}  left {duration(left)}")
        losses = {
            key.removeprefix("eval/").removesuffix("/CrossEntropyLoss"): value
            for key, value in metrics.items()
            if key.startswith("eval/") and key.endswith("/CrossEntropyLoss")
        }
        if losses:
            self.say(f"step {step} validation loss  " + "  ".join(f"{label} {loss:.4f}" for label, loss in losses.items()))

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def train_line(metrics: dict[str, Any]) -> str:
    """`loss 4.8123  lr 2.1e-03  grad 0.84  12.3k tokens/s`, and the number of skipped steps."""
    loss = metrics["train/CrossEntropyLoss"]
    parts = [
        "loss -" if math.isnan(loss) else f"loss {loss:.4f}",  # no step of the interval has a loss
        f"lr {metrics['optim/learning_rate_group0']:.2e}",
        f"grad {metrics['optim/total_grad_norm']:.2f}",
        f"{short(metrics['throughput/tokens_per_second'])} tokens/s",
    ]
    if metrics.get("throughput/mfu"):
        parts.append(f"mfu {metrics['throughput/mfu']:.1%}")
    if metrics["skipped"]:
        parts.append(f"skipped {metrics['skipped']}")
    return "  ".join(parts)

"""A look inside chosen steps, and at what a GPU's memory held when it ran out. Neither costs anything when it is not used.

The one idea: a trace is opened in a browser (ui.perfetto.dev or chrome://tracing), a table is read in the terminal; both
come from torch.profiler, which is started before a step and stopped after another.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from olmo_train import processes
from olmo_train.errors import ConfigError, UserError

DEAREST = 10  # operations of the table


@dataclass(frozen=True)
class ProfileConfig:
    start_step: int | None = None  # the first step that is traced; null: none
    steps: int = 3  # how many are

    def __post_init__(self) -> None:
        for key in ("start_step", "steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"profile.{key}", f"must be at least 1, got {value}; steps are counted from 1")


class StepProfiler:
    """Traces the chosen steps of one process into `folder`; `before(step)` is called before each step."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int):
        self._config, self._folder, self._rank = config, folder, rank
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        first = self._config.start_step
        if first is None:
            return
        if self._profiler is not None and step >= first + self._config.steps:
            self.close()
        elif step == first:
            self._profiler = torch.profiler.profile(acc_events=True)  # of the CPU, and of the GPU where there is one
            self._profiler.start()

    def close(self) -> None:
        """Write rank-NNNN.json and rank-NNNN.txt, when a trace is under way; also at the end of a shorter run."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / f"rank-{self._rank:04d}.json"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=DEAREST)
        (self._folder / f"rank-{self._rank:04d}.txt").write_text(table + "\n", encoding="utf-8")


class OutOfMemoryError(UserError):
    exit_code = 1


@contextlib.contextmanager
def out_of_memory_told(folder: Path, micro_batch_size: int, checkpointing: str) -> Iterator[None]:
    """Turn torch's error into one that says what to change. Raises OutOfMemoryError, after it has left in `folder` what
    the memory held: a summary to read, and torch's own snapshot for pytorch.org/memory_viz."""
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, torch.OutOfMemoryError) and "can't allocate memory" not in str(problem):  # the CPU's words
            raise
        rank = processes.rank()
        left = f"; what it held is in {folder}" if _write_memory(folder, rank) else ""
        error = OutOfMemoryError("micro_batch_size", f"{_first_line(problem)}{left}; {ways_out(micro_batch_size, checkpointing)}")
        if rank:  # rank 0, which tells all other errors, may have memory left and know nothing of it
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise error from problem


def ways_out(micro_batch_size: int, checkpointing: str) -> str:
    """What takes less memory and leaves the training as it is, dearest last."""
    ways = [f"a micro_batch_size below {micro_batch_size}"] if micro_batch_size > 1 else []
    if checkpointing != "full":
        better = "selective or full" if checkpointing == "none" else "full"
        ways.append(f"parallel.activation_checkpointing={better}")
    ways.append("more processes")
    return f"use {', or '.join(ways)}; `olmo-train plan` tells how much each takes"


def _first_line(problem: Exception) -> str:
    first = (str(problem).splitlines() or ["out of memory"])[0]
    return first[first.find("DefaultCPUAllocator") if "DefaultCPUAllocator" in first else 0 :].partition(". GPU ")[0].rstrip(".")


def _write_memory(folder: Path, rank: int) -> bool:
    """Whether there was a GPU, whose memory was written down."""
    if not torch.cuda.is_available():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank:04d}.txt").write_text(torch.cuda.memory_summary(), encoding="utf-8")
    torch.cuda.memory._dump_snapshot(str(folder / f"rank-{rank:04d}.pickle"))
    return True

"""Profiler traces of chosen steps; no cost when it is off.

torch.profiler writes a trace for the browser (ui.perfetto.dev or chrome://tracing) and a table for the terminal.
"""

from __future__ import annotations

from pathlib import Path

import torch

from olmo_train.log.config import ProfileConfig

DEAREST = 10  # operations of the table


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

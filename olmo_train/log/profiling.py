"""Profiler traces of chosen steps: one for the browser (ui.perfetto.dev or chrome://tracing) and a table for the terminal."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from olmo_train.log.config import ProfileConfig

TABLE_ROWS = 10  # operations in the table, the slowest first


def step_profiler(
    config: ProfileConfig, folder: Path, rank: int, next_step: int
) -> torch.profiler.profile | contextlib.nullcontext[None]:
    """Profiles the chosen steps of this process; call `step()` at the end of each step, from `next_step` on.

    Writes rank-NNNN.json and rank-NNNN.txt to `folder`, also when the run ends earlier. Is None inside `with` if no step is left
    to profile.
    """
    if config.start_step is None or config.start_step < next_step:
        return contextlib.nullcontext()

    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{rank:04d}.json"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=TABLE_ROWS)
        (folder / f"rank-{rank:04d}.txt").write_text(table + "\n", encoding="utf-8")

    skipped = config.start_step - next_step
    warmup = min(skipped, 1)
    schedule = torch.profiler.schedule(skip_first=skipped - warmup, wait=0, warmup=warmup, active=config.steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, acc_events=True)

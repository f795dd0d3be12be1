"""Read histories exported from Weights & Biases, as CSV or JSONL, to compare with public curves.

There are two kinds: a run's history, with `_step` and a column for each metric, and a chart's CSV of several runs, whose columns
are called `RUN - METRIC`, with `RUN - METRIC__MIN` and `__MAX` beside each.
"""

from __future__ import annotations

import contextlib
import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from olmo_train.curves.runs import STEP_KEYS, Run, Series, collect, elapsed_seconds, join, note_of, parent_of, read_run
from olmo_train.curves.seeds import average_seeds
from olmo_train.errors import ConfigError, DataError
from olmo_train.formats import counted
from olmo_train.history import json_lines

# OLMo logs training FLOPs in units of 1e9 under this name; ours are in FLOPs under the other.
GIGAFLOPS, FLOPS = "throughput/total_training_Gflops", "throughput/total_flops"


def read_runs(paths: list[Path], labels: list[str] = (), each_seed: bool = False) -> list[Run]:
    """Read run folders, all runs below other folders, and exported files into runs with distinct names. A branch is joined to
    its parent. Runs that differ only in their seed become their mean, unless `each_seed`. `labels` rename the runs, in order.

    Raises DataError when a path does not exist or holds no metrics, ConfigError when labels are not one for each run.
    """
    runs = []
    for path in paths:
        if path.is_dir():
            runs.extend(_runs_below(path))
        elif path.is_file():
            runs.extend(read_export(path))
        else:
            raise DataError(path, "does not exist; name a run_dir, or a history exported as .csv or .jsonl")
    runs = [_joined(run, runs) for run in runs]
    runs = [replace(run, name=name) for run, name in zip(runs, _distinct_names(runs), strict=True)]
    runs = runs if each_seed else average_seeds(runs)
    names = labels or _distinct_names(runs)
    if len(names) != len(runs):
        raise ConfigError("--label", f"{counted(len(names), 'label')} for {counted(len(runs), 'run')}; name each run, in order")
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def run_dirs(folder: Path) -> list[Path]:
    """The folder itself where it is a run_dir, else those below it."""
    found = []
    for place, folders, files in os.walk(folder):
        if "metrics.jsonl" in files:
            found.append(Path(place))
            folders.clear()
    return sorted(found)


def _runs_below(folder: Path) -> list[Run]:
    """The runs of a folder, those without metrics left out. Raises DataError when there is none."""
    runs = []
    for run_dir in (found := run_dirs(folder) or [folder]):
        try:
            run = read_run(run_dir)
        except DataError:
            if len(found) == 1:
                raise
        else:
            runs.append(run if run_dir == folder else replace(run, name=run_dir.relative_to(folder).as_posix()))
    if not runs:
        raise DataError(folder, "holds runs, but no metrics yet; wait for the first line (--follow waits for you)")
    return runs


def _joined(run: Run, runs: list[Run]) -> Run:
    """A branch with its parent's last point, or, where the parent is not drawn, with all of the parent before it."""
    parent_dir, step = parent_of(run) or (None, 0)
    if parent_dir is None or parent_dir.resolve() == run.path.resolve():
        return run
    drawn = next((other for other in runs if other.path.resolve() == parent_dir.resolve()), None)
    try:
        return join(run, drawn or _joined(read_run(parent_dir), runs), step, complete=drawn is None)
    except DataError:  # the parent is gone
        return run


def read_export(path: Path) -> list[Run]:
    """The runs of one exported file. Raises DataError when it has no step column or no numbers."""
    broken: list[int] = []
    if path.suffix == ".csv":
        rows = _csv_rows(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        rows = list(json_lines(path, broken))
    else:
        raise DataError(path, f"has the ending '{path.suffix}'; name a run_dir, or a history as .csv or .jsonl")
    if not any(key in row for row in rows[:100] for key in STEP_KEYS):
        raise DataError(path, "has no column _step, step or Step; export the history with its steps")
    runs = []
    for name, rows_of_run in _split_chart(rows, path.stem).items():
        series, clock = collect(rows_of_run)
        series = {key: value for key, value in series.items() if not key.endswith(("__MIN", "__MAX"))}
        if GIGAFLOPS in series and FLOPS not in series:
            giga = series[GIGAFLOPS]
            series[FLOPS] = Series(giga.steps, giga.values * 1e9)
        if series:
            runs.append(Run(name, path, series, elapsed_seconds(clock), notes=note_of(path, broken)))
    if not runs:
        raise DataError(path, "holds no metrics; export at least one metric beside the step")
    return runs


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Cells as floats; empty cells and text are left out."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for cells in csv.DictReader(file):
                rows.append({})
                for name, cell in cells.items():
                    with contextlib.suppress(TypeError, ValueError):
                        rows[-1][name] = float(cell)
    except (UnicodeDecodeError, csv.Error) as problem:
        raise DataError(path, f"is not a CSV file: {problem}") from problem
    return rows


def _split_chart(rows: list[dict[str, Any]], stem: str) -> dict[str, list[dict[str, Any]]]:
    """{run name: rows}: columns called `RUN - METRIC` go to RUN; a file without such columns is one run."""
    columns = {key for row in rows for key in row if " - " in key}
    if not columns:
        return {stem: rows}
    steps = [{key: row[key] for key in STEP_KEYS if key in row} for row in rows]
    split: dict[str, list[dict[str, Any]]] = {}
    for column in sorted(columns):
        name, _, metric = column.rpartition(" - ")
        split.setdefault(name, []).extend({**s, metric: row[column]} for s, row in zip(steps, rows, strict=True) if column in row)
    return split


def _distinct_names(runs: list[Run]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    names = [run.name for run in runs]
    for depth in range(2, 8):
        repeated = {name for name in names if names.count(name) > 1}
        if not repeated:
            return names
        names = [
            "/".join(run.path.resolve().parts[-depth:]) if name in repeated and run.path.is_dir() else name
            for run, name in zip(runs, names, strict=True)
        ]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]

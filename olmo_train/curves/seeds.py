"""Runs that differ only in their seed, as one run: the mean of each metric, and the lowest and highest of the seeds."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace

import numpy as np

from olmo_train.curves.runs import Run, Series, parent_of

SEED_KEYS = ("seed", "data.seed")


def average_seeds(runs: list[Run]) -> list[Run]:
    """The runs, where those that differ only in their seed are one run, in the place of the first."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(_all_but_seed(run), []).append(run)
    found = []
    for group in groups.values():
        repeated = len({_seed(run) for run in group}) < len(group)  # the same run twice, as before and after a change of code
        found += group if repeated or len(group) == 1 else [_average(group)]
    return sorted(found, key=lambda run: runs.index(run.seeds[0] if run.seeds else run))


def _seed(run: Run) -> tuple:
    return tuple(run.config.get(key) for key in SEED_KEYS)


def _all_but_seed(run: Run) -> object:
    """Equal for runs that differ only in their seed, in where they are written and in how they are logged."""
    if "seed" not in run.config:
        return id(run)
    kept = {key: value for key, value in run.config.items() if key not in ("run_dir", *SEED_KEYS) and not key.startswith("log.")}
    return parent_of(run), tuple(sorted((key, repr(value)) for key, value in kept.items()))


def _average(runs: list[Run]) -> Run:
    first, series, spread = runs[0], {}, {}
    for metric in dict.fromkeys(metric for run in runs for metric in run.series):
        series[metric], spread[metric] = _mean([run.series[metric] for run in runs if metric in run.series])
    clocks = [run.elapsed for run in runs if run.elapsed]
    states = Counter(run.state for run in runs if run.state)
    events = [{**event, "seed": run.config["seed"]} for run in runs for event in run.events]
    return replace(
        first,
        name=f"{_common_name(runs)} ({len(runs)} seeds)",
        series=series,
        spread=spread,
        seeds=tuple(runs),
        elapsed=_mean(clocks)[0] if clocks else None,
        events=events,
        config=first.config | {"seed": ", ".join(str(run.config["seed"]) for run in runs)},
        notes=[note for run in runs for note in run.notes],
        state=", ".join(f"{count} {state}" if len(states) > 1 else state for state, count in states.items()),
        about={name: text for name, text in first.about.items() if all(run.about.get(name) == text for run in runs)},
    )


def _mean(parts: list[Series]) -> tuple[Series, np.ndarray]:
    """The mean at each step over the seeds that have logged it, and their lowest and highest value (2, n)."""
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    total, count = np.zeros(len(steps)), np.zeros(len(steps))
    spread = np.array([np.full(len(steps), np.inf), np.full(len(steps), -np.inf)])
    for part in parts:
        at = np.searchsorted(steps, part.steps)
        total[at] += part.values
        count[at] += 1
        spread[0, at] = np.minimum(spread[0, at], part.values)
        spread[1, at] = np.maximum(spread[1, at], part.values)
    mean = Series(steps, total / count)
    spread[:, ~np.isfinite(mean.values)] = np.nan
    return mean, spread


def _common_name(runs: list[Run]) -> str:
    """What the names have in common without their seeds: `lr3e-3-seed1` and `lr3e-3-seed2` are `lr3e-3`."""
    names = [re.sub(rf"[-_,. ]?(seed|s)[-_=]?{run.config['seed']}(?!\d)", "", run.name) for run in runs]
    return os.path.commonprefix(names).strip("-_,./= ") or runs[0].name

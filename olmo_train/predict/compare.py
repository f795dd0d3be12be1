"""Compare the losses of a sweep: mean, spread over seeds, the best value, and whether the seeds separate it from the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from olmo_train.formats import counted

# The 97.5% quantile of Student's t distribution by its degrees of freedom, from 1 on; 1.96 for more.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
     2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The losses of one choice of values: {seed: loss}."""

    values: tuple[str, ...]
    losses: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% for the mean over seeds; None with one seed."""
        return interval(list(self.losses.values()))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of a mean by Student's t distribution; None for fewer than two values."""
    if len(values) < 2:
        return None
    t = T[len(values) - 2] if len(values) - 2 < len(T) else 1.96
    mean, half = statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def judge(keys: Sequence[str], rows: Sequence[Row]) -> str:
    """One line: the best value with its interval, or that the seeds do not separate it from others.

    Two choices are compared by the differences of their losses under the same seeds, which share initial weights and data.
    """
    rows = [row for row in rows if math.isfinite(row.mean)]
    if not rows:
        return "cannot tell: no choice has a finite loss"
    best = min(rows, key=lambda row: row.mean)
    unclear = []
    for other in rows:
        seeds = sorted(best.losses.keys() & other.losses.keys())
        found = interval([other.losses[seed] - best.losses[seed] for seed in seeds])
        if other is not best and (found is None or found[0] <= 0):
            unclear.append((other, found))
    if not unclear:
        low, high = best.interval or (best.mean, best.mean)
        seeds = counted(len(best.losses), "seed")
        return f"best: {named(keys, best)}, loss {best.mean:.4f} ({low:.4f} to {high:.4f}, 95% over {seeds})"
    other, found = min(unclear, key=lambda pair: pair[0].mean)
    if found is None:
        return f"cannot tell: {named(keys, best)} has the lowest loss, {best.mean:.4f}, with one seed; compare with --seeds 3"
    what = f"{named(keys, other)} is {found[0]:.4f} to {found[1]:.4f} above it (95%)"
    return f"cannot tell: {named(keys, best)} has the lowest loss, {best.mean:.4f}, and {what}; add seeds"


def named(keys: Sequence[str], row: Row) -> str:
    """`optim.peak_lr=3e-3`"""
    return " ".join(f"{key}={value}" for key, value in zip(keys, row.values, strict=True))


def draw(keys: Sequence[str], rows: Sequence[Row], metric: str, file: Path) -> None:
    """The mean loss over the first key, with each seed as a dot and the interval as a bar; a line for each choice of
    the other keys."""
    import matplotlib
    from matplotlib.figure import Figure

    from olmo_train.curves.figure import STYLE, plain
    from olmo_train.curves.panels import COLORS

    choices = list(dict.fromkeys(row.values[0] for row in rows))
    numbers = [_number(choice) for choice in choices]
    places: dict[str, float] = dict(zip(choices, map(float, range(len(choices))), strict=True))
    if all(number is not None for number in numbers):
        places = {choice: number for choice, number in zip(choices, numbers, strict=True) if number is not None}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.6), layout="constrained")
        axes = figure.subplots()
        for line, others in enumerate(dict.fromkeys(row.values[1:] for row in rows)):
            own = sorted((row for row in rows if row.values[1:] == others), key=lambda row: places[row.values[0]])
            color, x = COLORS[line % len(COLORS)], [places[row.values[0]] for row in own]
            label = " ".join(f"{key}={value}" for key, value in zip(keys[1:], others, strict=True))
            half = [(row.interval[1] - row.mean) if row.interval else 0.0 for row in own]
            axes.errorbar(x, [row.mean for row in own], yerr=half, color=color, capsize=2, label=plain(label))
            for row in own:
                axes.plot([places[row.values[0]]] * len(row.losses), list(row.losses.values()), "o", ms=2, color=color, alpha=0.6)
        used = list(places.values())
        if None not in numbers and min(used) > 0 and max(used) > 10 * min(used):
            axes.set_xscale("log")
        axes.set_xticks(used, [plain(choice) for choice in places], minor=False)
        axes.minorticks_off()
        axes.set_xlabel(plain(keys[0]))
        axes.set_ylabel(plain(metric))
        if keys[1:]:
            axes.legend()
        figure.savefig(file)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

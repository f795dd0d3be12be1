"""Curves in the terminal, at its full width; in a pipe the same text without colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from olmo_train.curves import panels, thin
from olmo_train.curves.panels import Curves, Panel, View
from olmo_train.curves.runs import Run
from olmo_train.formats import short

FIRST = ("Loss", "Gradient norm", "Learning rate")  # drawn when no metric is chosen
TALL, LOW = 18, 10  # rows of the first panel and of the others
COLORS = ("cyan+", "orange", "green+", "magenta+", "yellow", "blue+", "red+", "white")
SYMBOLS = ("o", "x", "+", "*", "#", "@")  # tell the curves apart where there are no colours


@dataclass(frozen=True)
class Look(View):
    width: int = 80  # columns
    color: bool = True


def draw_terminal(runs: list[Run], chosen: list[Curves], look: Look) -> str:
    """One line with each run's newest values, then the panels, one below the other."""
    blocks = [headline(run) for run in runs]
    for i, curves in enumerate(chosen):
        blocks += ["", *_legend(runs, curves, look)]
        drawn = _panel(runs, curves, look, TALL if i == 0 else LOW)
        blocks += [line.rstrip() for line in drawn.string(colorless=not look.color).splitlines()]
    return "\n".join(blocks)


def headline(run: Run) -> str:
    """`tiny: step 200 of 200, training 4.3012, validation web 4.4100, 1 resume`."""
    total = run.total_steps
    parts = [f"step {run.last_step:,}" + (f" of {total:,}" if total is not None else "")]
    for metric, series in run.series.items():
        panel, name = panels.place(metric)
        if panel.title == "Loss":
            parts.append(f"{name} {series.values[-1]:.4f}")
    for kind in ("resume", "spike", "skip"):
        count = sum(event["event"] == kind for event in run.events)
        if count:
            parts.append(f"{count} {kind}{'s' * (count > 1)}")
    return f"{run.name}: " + ", ".join(parts)


def _panel(runs: list[Run], curves: Curves, look: Look, height: int) -> Any:
    import plotext

    plotext.terminal.limit(False, False)  # else a plot is cut to what plotext believes is the terminal
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(look.width, height)
    figure.label(look.axis.label)
    figure.axes(False, axis="x", side="upper")
    figure.axes(False, axis="y", side="right")
    x_ends: list[float] = []
    y_ends: list[float] = []
    for n, (i, metric) in enumerate(panels.legend_names(runs, curves)):
        x, y = _points(runs[i], metric, curves.panel, look)
        if not len(x):
            continue
        x_ends += [x.min(), x.max()]
        y_ends += [y.min(), y.max()]
        marker = plotext.marker(_symbol(n, look) or "braille", COLORS[n % len(COLORS)])
        signal = figure.signal(x.tolist(), y.tolist(), marker=marker)
        signal.lines(look.color or not panels.is_evaluation(metric))
        figure.draw(signal)
    _rulers(figure, x_ends, y_ends, curves.panel.log, look)
    return figure.build()


def _legend(runs: list[Run], curves: Curves, look: Look) -> list[str]:
    """The panel's title and the names of its curves, on as many lines as they need, above the plot."""
    import plotext

    title = curves.panel.title + (f" ({curves.panel.shown_unit})" if curves.panel.shown_unit else "")
    names = list(panels.legend_names(runs, curves).values())
    lines, used = [title], len(title)
    for n, name in enumerate(names if len(names) > 1 else []):
        entry = f"{_symbol(n, look) or '──'} {name}"
        shown = str(plotext.colorize(entry, COLORS[n % len(COLORS)])) if look.color else entry
        if used + 3 + len(entry) > look.width:
            lines, used = [*lines, shown], len(entry)
        else:
            lines[-1], used = f"{lines[-1]}   {shown}", used + 3 + len(entry)
    return lines


def _symbol(n: int, look: Look) -> str | None:
    """The mark that draws the n-th curve; None is a line of dots, which colours tell apart."""
    return None if look.color or n == 0 else SYMBOLS[(n - 1) % len(SYMBOLS)]


def _points(run: Run, metric: str, panel: Panel, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a curve; on a logarithmic axis, their logarithms to base 10."""
    series, most = run.series[metric], 8 * look.width  # a column is two braille dots wide
    if look.smooth and panels.may_smooth(panel, metric):
        series = thin.smooth(thin.means(series, most), look.smooth)
    series = thin.thin(series, most)
    x, y = look.axis.at(run, series.steps), series.values
    if x is None:
        return np.empty(0), np.empty(0)
    keep = np.isfinite(y) & ((x > 0) | (not look.log_x)) & ((y > 0) | (not panel.log))
    x, y = x[keep], y[keep]
    return np.log10(x) if look.log_x else x, np.log10(y) if panel.log else y


def _rulers(figure: Any, x: list[float], y: list[float], log_y: bool, look: Look) -> None:
    """Round numbers on both axes."""
    for side, ends, log, count in (("x", x, look.log_x, look.width // 14), ("y", y, log_y, 5)):
        if not ends:
            continue
        low, high = min(ends), max(ends)
        if low == high:
            low, high = low - 0.5, high + 0.5
        ruler = figure.ruler(side)
        ruler.lim(low, high)
        at = _ticks(low, high, count, log, whole=side == "x" and look.axis.name == "step")
        ruler.ticks(at, [short(10**t if log else t, digits=4) for t in at])


def _ticks(low: float, high: float, count: int, log: bool, whole: bool) -> list[float]:
    """Round numbers between two ends, which on a logarithmic axis are logarithms to base 10, as the result is."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log and high - low > 0.7:
        ticks = LogLocator(subs=(1, 2, 5) if high - low < 2 else (1,), numticks=99).tick_values(10**low, 10**high)
    else:
        ticks = MaxNLocator(count, integer=whole).tick_values(*((10**low, 10**high) if log else (low, high)))
    ticks = np.log10(ticks[ticks > 0]) if log else ticks
    return [float(t) for t in ticks if low <= t <= high]

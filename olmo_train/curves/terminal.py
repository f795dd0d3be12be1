"""Curves in the terminal, at its full width; in a pipe the same text without colours."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np

from olmo_train.curves import panels, thin
from olmo_train.curves.panels import Curves, Panel, View
from olmo_train.curves.runs import Run

FIRST = ("Loss", "Gradient norm", "Learning rate")  # drawn when no metric is chosen
TALL, LOW = 18, 10  # rows of the first plot and of the others
LEAST_TALL, LEAST_LOW = 9, 7  # the same in a terminal of few rows
COLORS = ("cyan+", "orange", "green+", "magenta+", "yellow", "blue+", "red+", "white")
SYMBOLS = ("o", "x", "+", "*", "#", "@")  # tell curves of one colour apart


@dataclass(frozen=True)
class Look(View):
    width: int = 80  # columns
    height: int | None = None  # rows to fit in; None: as many as it takes
    color: bool = True


def draw_terminal(runs: list[Run], chosen: list[Curves], look: Look) -> str:
    """One line with each run's newest values, then the panels, one below the other, as many as there is room for."""
    blocks = [headline(run) for run in runs]
    if look.height:
        most = max(1, look.height // 4)
        if len(blocks) > most:
            blocks = [*blocks[: most - 1], f"and {len(blocks) - most + 1} more runs"]
        if len(blocks) == 1:
            blocks = textwrap.wrap(blocks[0], look.width, subsequent_indent="  ")
        blocks = [line if len(line) <= look.width else line[: look.width - 1] + "…" for line in blocks]
    legends = [_legend(runs, curves, look) for curves in chosen]
    marks = bool(panels.marked_kinds(runs))
    rows = _plot_rows(look.height and look.height - len(blocks) - marks, [len(legend) for legend in legends])
    for i, (curves, legend, height) in enumerate(zip(chosen, legends, rows, strict=False)):
        blocks += ["", *legend] if look.height is None else legend
        blocks += _panel(runs, curves, look, height, with_marks=marks and i == 0)
    return "\n".join(blocks)


def _plot_rows(free: int | None, legends: list[int]) -> list[int]:
    """The rows of each plot; fewer plots than legends where there is no room for all. `legends`: the rows of each legend."""
    count = len(legends)
    if free is None:
        return [TALL, *[LOW] * (count - 1)]
    while count > 1 and sum(legends[:count]) + LEAST_TALL + (count - 1) * LEAST_LOW > free:
        count -= 1
    rows, low = free - sum(legends[:count]), LEAST_LOW
    while low < LOW and rows - (count - 1) * (low + 1) >= TALL:
        low += 1
    return [max(LEAST_TALL, rows - (count - 1) * low), *[low] * (count - 1)]


def headline(run: Run) -> str:
    """`tiny: step 200 of 200, training 4.3012, validation web 4.4100, ▶ 1 resume`; the signs are those above the plot."""
    total = run.total_steps
    parts = [f"step {run.last_step:,}" + (f" of {total:,}" if total is not None else "")]
    for metric, series in run.series.items():
        panel, name = panels.place(metric)
        if panel.title == "Loss":
            low, high = run.spread[metric][:, -1] if run.seeds else (0, 0)
            parts.append(f"{name} {series.values[-1]:.4f}" + (f" ({low:.4f} to {high:.4f})" if low < high else ""))
    for kind, mark in panels.EVENTS.items():
        count = sum(event["event"] == kind for event in run.events)
        if count and mark.shown:
            parts.append(f"{mark.glyph} {count} {kind}{'s' * (count > 1)}")
    return f"{run.name}: " + ", ".join(parts)


def _panel(runs: list[Run], curves: Curves, look: Look, height: int, with_marks: bool) -> list[str]:
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
    for (i, metric), (color, symbol) in _styles(runs, curves, look).items():
        x, y = _points(runs[i], metric, curves.panel, look)
        if not len(x):
            continue
        x_ends += [x.min(), x.max()]
        y_ends += [y.min(), y.max()]
        signal = figure.signal(x.tolist(), y.tolist(), marker=plotext.marker(symbol or "braille", color))
        signal.lines(look.color or not panels.is_evaluation(metric))
        figure.draw(signal)
    _rulers(figure, x_ends, y_ends, curves.panel.log, look, rows=height - 3)  # without the axis, its numbers and its name
    plot = figure.build()
    lines = [line.rstrip() for line in plot.string(colorless=not look.color).splitlines()]
    if not with_marks:
        return lines
    axis = min(
        (line.find(sign) for line in plot.string(colorless=True).splitlines() for sign in "┤│┼" if sign in line), default=-1
    )
    return [_marks(runs, look, axis + 1, x_ends), *lines]


def _legend(runs: list[Run], curves: Curves, look: Look) -> list[str]:
    """The panel's title and the names of its curves, on as many lines as they need, above the plot."""
    import plotext

    title = curves.panel.title + (f" ({curves.panel.shown_unit})" if curves.panel.shown_unit else "")
    lines, used = [title], len(title)
    entries: dict[str, str | None] = {}  # {text: colour}
    names, styles = panels.legend_names(runs, curves), _styles(runs, curves, look)
    if look.color and len(runs) > 1 and len(curves.metrics) > 1:  # the hue is the run, the symbol the metric
        entries = {f"── {name}": COLORS[i] for i, name in enumerate(panels.hues(runs)[0])}
        entries |= {f"{styles[i, m][1] or '──'} {curves.metrics[m]}": None for i, m in names}
    elif len(names) > 1:
        for curve, name in names.items():
            entries.setdefault(f"{styles[curve][1] or '──'} {name}", styles[curve][0])
    for entry, color in entries.items():
        shown = str(plotext.colorize(entry, color)) if look.color and color else entry
        if used + 3 + len(entry) > look.width:
            lines, used = [*lines, shown], len(entry)
        else:
            lines[-1], used = f"{lines[-1]}   {shown}", used + 3 + len(entry)
    most = max(2, (look.height or 1000) // 8)
    return lines if len(lines) <= most else [*lines[: most - 1], f"and more curves, {len(names)} in all"]


def _styles(runs: list[Run], curves: Curves, look: Look) -> dict[tuple[int, str], tuple[str, str | None]]:
    """{curve: (colour, symbol)}. The hue is the run's, or of a single run the curve's; None is a line of dots."""
    styles: dict[tuple[int, str], tuple[str, str | None]] = {}
    hues, kinds = panels.hues(runs)[1], list(curves.metrics)
    for i, metric in panels.legend_names(runs, curves):
        kind = kinds.index(metric)
        hue, shape = (kind, 0) if len(runs) == 1 else (hues[i], kind)
        shape = shape if look.color else hues[i] * len(kinds) + kind
        styles[i, metric] = COLORS[hue % len(COLORS)], SYMBOLS[(shape - 1) % len(SYMBOLS)] if shape else None
    return styles


def _marks(runs: list[Run], look: Look, first: int, x_ends: list[float]) -> str:
    """The row of marks above a plot, each event in the column of its step. `first`: the column of the left end of the x axis."""
    import plotext

    low, high = min(x_ends, default=0), max(x_ends, default=0)
    row = [" "] * look.width
    hues = panels.hues(runs)[1]
    for i, kind, steps in panels.marks(runs):
        x, mark = look.axis.at(runs[i], steps), panels.EVENTS[kind]
        color = mark.terminal_color if len(runs) == 1 else COLORS[hues[i]]
        for place in () if x is None or low == high else np.log10(x) if look.log_x else x:
            column = first + round((look.width - 1 - first) * (place - low) / (high - low))
            if first <= column < look.width:
                row[column] = str(plotext.colorize(mark.glyph, color)) if look.color else mark.glyph
    return "".join(row).rstrip()


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


def _rulers(figure: Any, x: list[float], y: list[float], log_y: bool, look: Look, rows: int) -> None:
    """Round numbers on both axes, at most one in each of the plot's rows."""
    for side, ends, log, count in (("x", x, look.log_x, min(10, look.width // 14)), ("y", y, log_y, min(5, rows // 2))):
        if not ends:
            continue
        low, high = min(ends), max(ends)
        if low == high:
            low, high = low - 0.5, high + 0.5
        ruler = figure.ruler(side)
        ruler.lim(low, high)
        at = _ticks(low, high, count, log, whole=side == "x" and look.axis.name == "step")
        if side == "y":
            at = _one_a_row(at, (high - low) / (rows - 1))
        ruler.ticks(at, [panels.tick_text(10**t, 10**high, 4) if log else panels.tick_text(t, high, 4) for t in at])


def _one_a_row(ticks: list[float], row: float) -> list[float]:
    """The ticks without those less than a row, in units of the axis, above another: they would be written over each other."""
    kept = ticks[:1]
    for tick in ticks[1:]:
        if tick - kept[-1] >= row:
            kept.append(tick)
    return kept


def _ticks(low: float, high: float, count: int, log: bool, whole: bool) -> list[float]:
    """Round numbers between two ends, which on a logarithmic axis are logarithms to base 10, as the result is."""
    from matplotlib.ticker import MaxNLocator

    if log:
        return np.log10(panels.log_ticks(10**low, 10**high, count)).tolist()
    return [
        float(t) for t in MaxNLocator(count, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t <= high
    ]

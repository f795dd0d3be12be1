"""Curves as a figure for a paper: PNG, SVG or PDF, at the width of one column or of two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmo_train.curves import panels, thin
from olmo_train.curves.panels import Axis, Curves, View
from olmo_train.curves.runs import Run, Series
from olmo_train.formats import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST = ("Loss", "Gradient norm", "Learning rate", "Throughput")  # drawn when no metric is chosen
ONE_COLUMN, TWO_COLUMNS = 3.4, 7.0  # inches, as in most two-column papers
MAX_POINTS = 3000  # of one curve; more than the dots of a printed column
# The dashes of panels.DASHES, in matplotlib's terms: (offset, (points on, points off, ...)).
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 3)), (0, (8, 3, 1, 3)))
MARKS = {"resume": "#6C757D", "rewind": "#7B3294", "spike": "#D55E00", "skip": "#E69F00"}  # event: colour of its line
MOST_MARKS = 12  # of one kind
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6e9",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.1,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # letters stay letters, as publishers ask
    "svg.hashsalt": "olmo_train",  # the same run makes the same file
}


def write_figure(runs: list[Run], chosen: list[Curves], path: Path, view: View) -> None:
    """Draw the panels in `chosen` and save them at `path`, whose ending selects the format."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = 1 if len(chosen) == 1 else 2
    rows = -(-len(chosen) // columns)
    with matplotlib.rc_context(STYLE):
        width = ONE_COLUMN if columns == 1 else TWO_COLUMNS
        figure = Figure(figsize=(width, (2.3 if columns == 1 else 1.95) * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, curves in zip(grid, chosen, strict=False):
            _draw_panel(axes, runs, curves, view)
        for axes in grid[len(chosen) :]:
            axes.remove()
        if len(runs) > 1 and columns == 2:
            _runs_legend(figure, runs)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def plain(text: str | None) -> str | None:
    """Text that matplotlib prints unchanged: no dollar starts a formula, and no leading underscore hides a legend entry."""
    return text and (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _draw_panel(axes: Axes, runs: list[Run], curves: Curves, view: View) -> None:
    names = panels.legend_names(runs, curves)
    kinds = list(dict.fromkeys(curves.metrics.values()))
    shared_legend = len(runs) > 1 and axes.get_subplotspec().get_gridspec().ncols == 2
    for (i, metric), name in names.items():
        kind = kinds.index(curves.metrics[metric])
        hue, dash = (kind, 0) if len(runs) == 1 else (i, kind)
        style = {
            "color": panels.COLORS[hue % len(panels.COLORS)],
            "linestyle": DASHES[dash % len(DASHES)],
        }
        if shared_legend:  # the figure's legend explains the colours; here only the dashes
            name = curves.metrics[metric] if i == min(r for r, m in names if m == metric) and len(kinds) > 1 else None
        window = view.smooth if panels.may_smooth(curves.panel, metric) else 0
        _draw_curve(axes, runs[i], metric, name, style, view.axis, window)
    for value in {run.config.get(curves.panel.limit) for run in runs} - {None}:
        axes.axhline(value, color="#6c757d", linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1)
        axes.annotate(f"{curves.panel.limit_name} {value:g}", (1, value), (0, 1.5), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", va="bottom", fontsize=7, color="#6c757d")  # fmt: skip
    if len(runs) == 1:
        _mark_events(axes, runs[0], view.axis, with_words=len(kinds) == 1)  # a legend needs their place
    axes.set_xlabel(plain(view.axis.label))
    axes.set_ylabel(plain(curves.panel.unit))
    axes.set_title(plain(curves.panel.title), loc="left", fontweight="bold")
    if view.log_x:
        axes.set_xscale("log")
    if curves.panel.log:
        axes.set_yscale("log")
    _number_axes(axes, view, curves.panel.log)
    if len(kinds) > 1 or (len(runs) > 1 and not shared_legend):
        legend = axes.legend(loc="best")
        for handle in legend.get_lines():
            handle.set_alpha(1)
            if shared_legend:
                handle.set_color("#3d444b")


def _draw_curve(axes: Axes, run: Run, metric: str, name: str | None, style: dict, axis: Axis, window: float) -> None:
    series = run.series[metric]
    raw = thin.thin(series, MAX_POINTS)
    if window:
        _plot(axes, run, raw, axis, alpha=0.25, linewidth=0.5, color=style["color"])
        _plot(axes, run, thin.smooth(thin.means(series, MAX_POINTS), window), axis, label=plain(name), **style)
    else:
        few = panels.is_evaluation(metric) and len(series) <= 60
        _plot(axes, run, raw, axis, label=plain(name), marker="o" if few else None, markersize=2.2, **style)


def _plot(axes: Axes, run: Run, series: Series, axis: Axis, **style) -> None:
    x = axis.at(run, series.steps)
    if x is not None:
        axes.plot(x, np.where(np.isfinite(series.values), series.values, np.nan), **style)


def _mark_events(axes: Axes, run: Run, axis: Axis, with_words: bool) -> None:
    """A thin line at each resume, rewind, spike and skipped step. Lines that are close share a label."""
    marks: list[tuple[float, str]] = []
    for name in MARKS:
        steps = np.unique([event["step"] for event in run.events if event["event"] == name and event["step"] > 0])
        x = axis.at(run, steps) if len(steps) <= MOST_MARKS else None  # more would hide the curve
        marks += [] if x is None else [(float(place), name) for place in x]
    low, high = axes.get_xlim()
    words: list[tuple[float, list[str]]] = []  # where a group of lines ends, and their names
    for place, name in sorted(marks):
        axes.axvline(place, color=MARKS[name], linewidth=0.6, linestyle=(0, (3, 2)), zorder=1)
        if not words or place - words[-1][0] > 0.04 * (high - low):
            words.append((place, []))
        words[-1] = (place, words[-1][1] + [name])
    for place, names in words if with_words else ():
        style = {"ha": "left", "va": "top", "rotation": 90, "fontsize": 5.5, "color": MARKS[names[-1]]}
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(", ".join(dict.fromkeys(names)), (place, 1), (1.5, -2), **where, **style)


def _number_axes(axes: Axes, view: View, log_y: bool) -> None:
    """Few round numbers; a log axis of less than three decades has 2 and 5 beside 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    numbers = FuncFormatter(lambda value, _: short(value, digits=6))
    if not view.log_x:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=view.axis.name == "step", steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(numbers)
    if not log_y:
        axes.yaxis.set_major_formatter(numbers)
        return
    low, high = axes.get_ylim()
    if high / low < 1000:
        digits = (1, 2, 5) if high / low > 6 else range(1, 10)
        axes.yaxis.set_major_locator(LogLocator(subs=digits) if high / low > 3 else MaxNLocator(5))
        axes.yaxis.set_major_formatter(numbers)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _runs_legend(figure: Figure, runs: list[Run]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=panels.COLORS[i % len(panels.COLORS)], linewidth=1.6, label=plain(run.name))
        for i, run in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 5))

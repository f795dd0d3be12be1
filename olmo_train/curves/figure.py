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
LEGEND_WIDTH = 56  # characters of a line of a panel's legend, of which each entry's line takes 7
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
    "legend.handlelength": 2.6,
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
        _figure_legends(figure, runs, with_runs=len(runs) > 1 and columns == 2)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def plain(text: str | None) -> str | None:
    """Text that matplotlib prints unchanged: no dollar starts a formula, and no leading underscore hides a legend entry."""
    return text and (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _draw_panel(axes: Axes, runs: list[Run], curves: Curves, view: View) -> None:
    names = panels.legend_names(runs, curves)
    kinds = list(dict.fromkeys(curves.metrics.values()))
    shared_legend = len(runs) > 1 and axes.get_subplotspec().get_gridspec().ncols == 2
    hues, drawn = panels.hues(runs)[1], set()
    for (i, metric), name in names.items():
        kind = kinds.index(curves.metrics[metric])
        hue, dash = (kind, 0) if len(runs) == 1 else (hues[i], kind)
        style = {
            "color": panels.COLORS[hue % len(panels.COLORS)],
            "linestyle": DASHES[dash % len(DASHES)],
        }
        if shared_legend:  # the figure's legend explains the colours; here only the dashes
            name = curves.metrics[metric] if i == min(r for r, m in names if m == metric) and len(kinds) > 1 else None
        elif name in drawn:
            name = None  # of another run of its group
        drawn.add(name)
        window = view.smooth if panels.may_smooth(curves.panel, metric) else 0
        _draw_curve(axes, runs[i], metric, name, style, view.axis, window)
    for value in {run.config.get(curves.panel.limit) for run in runs} - {None}:
        axes.axhline(value, color="#6c757d", linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1)
        axes.annotate(f"{curves.panel.limit_name} {value:g}", (1, value), (3, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="left", va="center", fontsize=7, color="#6c757d")  # fmt: skip
    _mark_events(axes, runs, view.axis)
    axes.set_xlabel(plain(view.axis.label))
    axes.set_ylabel(plain(curves.panel.unit))
    if view.log_x:
        axes.set_xscale("log")
    if curves.panel.log:
        axes.set_yscale("log")
    _number_axes(axes, view, curves.panel.log)
    rows = 0
    if len(kinds) > 1 or (len(runs) > 1 and not shared_legend):
        rows = _panel_legend(axes, gray=shared_legend)
    axes.set_title(plain(curves.panel.title), loc="left", fontweight="bold", pad=10.5 + 10.5 * rows)


def _panel_legend(axes: Axes, gray: bool) -> int:
    """A legend between title and plot, where it hides no curve. Returns its number of rows."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(len(names), LEGEND_WIDTH // (7 + max(map(len, names), default=0))))
    legend = axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=1.0, borderpad=0,
                         labelspacing=0.2, columnspacing=1.2)  # fmt: skip
    for handle in legend.get_lines():
        handle.set_alpha(1)
        if gray:
            handle.set_color("#3d444b")
    return -(-len(names) // columns)


def _draw_curve(axes: Axes, run: Run, metric: str, name: str | None, style: dict, axis: Axis, window: float) -> None:
    series = run.series[metric]
    raw = thin.thin(series, MAX_POINTS)
    if window:
        if metric not in run.spread:
            _plot(axes, run, raw, axis, alpha=0.25, linewidth=0.5, color=style["color"])
        _plot(axes, run, thin.smooth(thin.means(series, MAX_POINTS), window), axis, label=plain(name), **style)
    else:
        few = panels.is_evaluation(metric) and len(series) <= 60
        _plot(axes, run, raw, axis, label=plain(name), marker="o" if few else None, markersize=2.2, **style)
    if metric in run.spread:
        low, high = thin.spread(series, run.spread[metric], MAX_POINTS, window)
        x = axis.at(run, low.steps)
        if x is not None:
            axes.fill_between(x, low.values, high.values, color=style["color"], alpha=0.18, linewidth=0)


def _plot(axes: Axes, run: Run, series: Series, axis: Axis, **style) -> None:
    x = axis.at(run, series.steps)
    if x is not None:
        axes.plot(x, np.where(np.isfinite(series.values), series.values, np.nan), **style)


def _mark_events(axes: Axes, runs: list[Run], axis: Axis) -> None:
    """The marks of events on the upper edge of the plot, in the colour of their run where there are several."""
    hues = panels.hues(runs)[1]
    for i, kind, steps in panels.marks(runs):
        x, mark = axis.at(runs[i], steps), panels.EVENTS[kind]
        if x is not None:
            height, size = (1.015, 1.6) if kind == "save" else (1.06, 4)  # of the axes, points: they do not touch
            axes.plot(x, [height] * len(x), mark.matplotlib, color=mark.color if len(runs) == 1 else panels.COLORS[hues[i]],
                      markersize=size, markeredgewidth=0, transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip


def _number_axes(axes: Axes, view: View, log_y: bool) -> None:
    """Few round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    numbers = FuncFormatter(lambda value, _: short(value, digits=6))
    top = axes.get_ylim()[1]
    y_numbers = FuncFormatter(lambda value, _: panels.tick_text(value, top, digits=6))
    if not view.log_x:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=view.axis.name == "step", steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(numbers)
    if not log_y:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(y_numbers)
        return
    axes.yaxis.set_major_locator(FixedLocator(panels.log_ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(y_numbers)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure_legends(figure: Figure, runs: list[Run], with_runs: bool) -> None:
    """What the hues and the marks mean, above and below all panels."""
    from matplotlib.lines import Line2D

    names = panels.hues(runs)[0]
    if with_runs:
        handles = [Line2D([], [], color=panels.COLORS[i], linewidth=1.6, label=plain(name)) for i, name in enumerate(names)]
        widest = max(len(name) for name in names)
        figure.legend(handles=handles, loc="outside upper center", ncols=max(1, min(len(names), 100 // (8 + widest))))
    marks = {kind: panels.EVENTS[kind] for kind in panels.marked_kinds(runs)}
    if marks:
        one = len(runs) == 1
        handles = [
            Line2D([], [], linestyle="", marker=mark.matplotlib, markeredgewidth=0, markersize=4, label=kind,
                   color=mark.color if one else "#3d444b") for kind, mark in marks.items()
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handletextpad=0, columnspacing=1)

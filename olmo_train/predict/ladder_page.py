"""The picture of a fit, and its page: one HTML file that needs no server and no script."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmo_train.curves.figure import STYLE, TWO_COLUMNS, plain
from olmo_train.curves.panels import COLORS
from olmo_train.formats import short
from olmo_train.predict.fit import Fit, Forecast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUDGETS = 5  # isoFLOP curves
CURVE_POINTS, BAND_POINTS = 120, 25
GRAY = "#6c757d"
GAP = 2.5  # of the logarithm of an axis' ends, beyond the points
TABLE_STYLE = """
main { display: grid; gap: 12px; } main section { padding: 12px; } h2 { font-size: 16px; margin: 0 0 8px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 12px; }
.panels figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 8px; }
.panels svg { display: block; width: 100%; height: auto; } .doubt { font-weight: 600; }
"""


def write_picture(fit: Fit, forecast: Forecast | None, file: Path) -> None:
    """All panels in one picture."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(TWO_COLUMNS, 5.2), layout="constrained")
        for axes, draw in zip(figure.subplots(2, 2).ravel(), PANELS.values(), strict=True):
            draw(axes, fit, forecast)
        figure.savefig(file)


def write_page(
    file: Path, fit: Fit, forecast: Forecast | None, facts: Sequence[str], doubt: str, tables: dict[str, list[list[str]]]
) -> None:
    """`facts`: the lines below the title; `doubt`: why the forecast says little, or nothing; `tables`: rows by heading, the first
    of them with the names of the columns."""
    title = f"Ladder {file.absolute().parent.name}"
    text = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', '<meta name="color-scheme" content="light dark">',
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
        f"<title>{html.escape(title)}</title>",
        f"<style>{files('olmo_train.curves').joinpath('page.css').read_text(encoding='utf-8')}{TABLE_STYLE}</style>",
        "</head>", "<body>", f'<header id="heading"><h1>{html.escape(title)}</h1>',
        *(f"<p>{html.escape(fact)}</p>" for fact in facts),
        f'<p class="doubt">{html.escape(doubt)}</p>' if doubt else "", "</header>", "<main>", '<div class="panels">',
        *(f'<figure aria-label="{name}">{svg(draw, fit, forecast)}</figure>' for name, draw in PANELS.items()), "</div>",
        *(table(heading, rows) for heading, rows in tables.items()), "</main>", "</body>", "</html>", "",
    ]  # fmt: skip
    file.write_text("\n".join(text), encoding="utf-8")


def table(heading: str, rows: list[list[str]]) -> str:
    """A section with a table; all columns but the first are numbers."""

    def row(cells: list[str], tag: str) -> str:
        kinds = ["", *[' class="number"'] * (len(cells) - 1)]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows[1:])
    head = f"<thead><tr>{row(rows[0], 'th')}</tr></thead>"
    scroll = f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'
    return f"<section><h2>{html.escape(heading)}</h2>{scroll}</section>"


def svg(draw: Callable, fit: Fit, forecast: Forecast | None) -> str:
    """A panel as an element of a page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure, stream = Figure(figsize=(4.2, 3.0), layout="constrained"), io.StringIO()
        draw(figure.subplots(), fit, forecast)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


# ---- panels


def draw_losses(axes: Axes, fit: Fit, forecast: Forecast | None) -> None:
    """Loss over tokens: points and law of each size, and the forecast."""
    points = fit.points
    ends = points.tokens.min() / GAP, max(points.tokens.max(), forecast.tokens if forecast else 0) * GAP
    tokens = np.geomspace(*ends, CURVE_POINTS)
    for i, size in enumerate(sizes_of(fit)):
        own, color = points.parameters == size, COLORS[i % len(COLORS)]
        axes.plot(tokens, fit.loss(np.full(CURVE_POINTS, size), tokens), color=color, linewidth=0.9)
        axes.plot(points.tokens[own], points.losses[own], "o", ms=3, color=color, label=short(size))
    if forecast:
        target(axes, forecast.tokens, forecast)
    label(axes, "Loss over tokens", "tokens", "loss")
    axes.legend(title="parameters", fontsize=6.5, title_fontsize=6.5)


def draw_residuals(axes: Axes, fit: Fit, forecast: Forecast | None) -> None:
    """Measured over fitted loss, over the compute of each run."""
    points = fit.points
    axes.axhspan(-100 * fit.noise, 100 * fit.noise, color=GRAY, alpha=0.15, linewidth=0)
    axes.axhline(0, color=GRAY, linewidth=0.7)
    for i, size in enumerate(sizes_of(fit)):
        own = points.parameters == size
        flops = 6 * points.parameters[own] * points.tokens[own]
        axes.plot(flops, 100 * fit.residuals[own], "o", ms=3, color=COLORS[i % len(COLORS)])
    label(axes, "Measured over fitted loss", "FLOPs, 6 N D", "difference (%)")


def draw_iso_flops(axes: Axes, fit: Fit, forecast: Forecast | None) -> None:
    """Loss over parameters at equal compute, with the best size of each budget."""
    points = fit.points
    compute = 6 * points.parameters * points.tokens
    last = 6 * forecast.parameters * forecast.tokens if forecast else compute.max()
    largest = max(points.parameters.max(), forecast.parameters if forecast else 0) * GAP
    sizes = np.geomspace(points.parameters.min() / GAP, largest, CURVE_POINTS)
    for i, budget in enumerate(np.geomspace(compute.min(), max(last, compute.max()), BUDGETS)):
        losses, color = fit.loss(sizes, budget / (6 * sizes)), COLORS[i % len(COLORS)]
        best = losses.argmin()
        axes.plot(sizes, losses, color=color, linewidth=0.9)
        side = "right" if best == len(sizes) - 1 else "center"
        axes.annotate(short(budget, 2), (sizes[best], losses[best]), (0, 4), textcoords="offset points", ha=side, fontsize=6.5,
                      color=color)  # fmt: skip
        if 0 < best < len(sizes) - 1:
            axes.plot(sizes[best], losses[best], "v", ms=4, color=color)
    if forecast:
        target(axes, forecast.parameters, forecast)
    low = fit.points.losses.min()
    axes.set_ylim(0.97 * min(low, forecast.low if forecast else low), 1.08 * points.losses.max())
    label(axes, "Loss at equal compute, in FLOPs", "parameters", "loss")


def draw_interval(axes: Axes, fit: Fit, forecast: Forecast | None) -> None:
    """The forecast and its interval over compute, at the tokens per parameter of the target, or of the longest runs."""
    points = fit.points
    ratio = forecast.tokens / forecast.parameters if forecast else float((points.tokens / points.parameters).max())
    compute = 6 * points.parameters * points.tokens
    last = 6 * forecast.parameters * forecast.tokens if forecast else 10 * compute.max()
    flops = np.geomspace(compute.min(), max(last, compute.max()) * GAP, BAND_POINTS)
    sizes = np.sqrt(flops / (6 * ratio))
    found = [fit.forecast(size, ratio * size) for size in sizes]
    axes.fill_between(flops, [f.low for f in found], [f.high for f in found], color=COLORS[0], alpha=0.18, linewidth=0)
    axes.plot(flops, [f.loss for f in found], color=COLORS[0], linewidth=0.9, label=f"{ratio:.3g} tokens per parameter")
    axes.plot(compute, points.losses, "o", ms=2.5, color=GRAY, label="runs")
    if forecast:
        target(axes, last, forecast)
    label(axes, "Forecast and 90% interval", "FLOPs, 6 N D", "loss")
    axes.legend(fontsize=6.5)


PANELS = {"loss over tokens": draw_losses, "residuals": draw_residuals, "loss at equal compute": draw_iso_flops,
          "forecast and interval": draw_interval}  # fmt: skip


def sizes_of(fit: Fit) -> list[float]:
    """The sizes, the smallest first."""
    return sorted(set(fit.points.parameters.tolist()))


def target(axes: Axes, x: float, forecast: Forecast) -> None:
    """The forecast with its interval."""
    ends = [[forecast.loss - forecast.low], [forecast.high - forecast.loss]]
    axes.errorbar([x], [forecast.loss], yerr=ends, fmt="*", ms=6, color="#1b1f23", capsize=2, elinewidth=0.8, zorder=3)


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and axes; all x axes are logarithmic."""
    axes.set_xscale("log")
    axes.set_title(plain(title), loc="left", fontweight="bold")
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))

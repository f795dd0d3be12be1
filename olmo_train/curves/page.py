"""The page: one HTML file with the data, the plotting library and the code, which loads nothing from a network.

This module prepares the data and fills `page.html`; `plots.js` and `page.js` draw it. Values are written as Python's shortest
representation of a float, which reads back bit for bit. A run of up to `MAX_POINTS` lines is complete in the page.
"""

from __future__ import annotations

import html
import json
import math
import re
from importlib.resources import files
from typing import Any

import numpy as np

from olmo_train.curves import panels, thin
from olmo_train.curves.panels import Axis, Curves, View
from olmo_train.curves.runs import Run, Series

MAX_POINTS = 4000  # of one curve: more than the pixels of any screen
MIN_POINTS = 500
PAGE_POINTS = 250_000  # of all curves together, so that many runs still open at once
MAX_EVENTS = 400  # of one kind and run
MAX_OWN_PANELS = 24  # a run may log hundreds of custom metrics


def data_text(runs: list[Run], chosen: list[Curves], view: View) -> str:
    """The data of the page as JSON that can stand in a script element."""
    return json.dumps(page_data(runs, chosen, view), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def page_text(runs: list[Run], chosen: list[Curves], view: View, live: bool = False) -> str:
    """The text of the HTML file; a live page asks its server for new data."""
    parts = {
        "LIVE": "connect-src 'self'" if live else "",
        "TITLE": html.escape(" · ".join(run.name for run in runs)),
        "STYLE": _file("page.css"),
        "DATA": data_text(runs, chosen, view),
        "PLOTLY": _plotly(),
        "SCRIPT": _file("plots.js") + _file("page.js"),
    }
    pieces = _file("page.html").split("%%")  # text, name, text, name, ... text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def page_data(runs: list[Run], chosen: list[Curves], view: View) -> dict[str, Any]:
    """Everything that the page draws, as JSON. A value that is not finite is null, and in the curve's `odd` as text."""
    known = [curves for curves in chosen if curves.panel in panels.PANELS]
    own = [curves for curves in chosen if curves.panel not in panels.PANELS]
    axes = panels.axes(runs)
    shown = known + own[:MAX_OWN_PANELS]
    count = sum(metric in run.series for curves in shown for metric in curves.metrics for run in runs)
    max_points = min(MAX_POINTS, max(MIN_POINTS, PAGE_POINTS // max(1, count)))
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    if any(run.seeds for run in runs):
        notes.append("A curve of several seeds is their mean; the band reaches from the lowest to the highest of them")
    if len(own) > MAX_OWN_PANELS:
        notes.append(f"{len(own) - MAX_OWN_PANELS} more metrics are not drawn; choose them with --metric")
    return {
        "look": {"axis": view.axis.name, "log_x": view.log_x, "smooth": view.smooth},
        "axes": {axis.name: axis.label for axis in axes.values()},
        "colors": {"light": panels.COLORS, "dark": panels.DARK_COLORS},
        "dashes": panels.DASHES,
        "hues": panels.hues(runs)[0],
        "events": {kind: vars(mark) for kind, mark in panels.EVENTS.items()},
        "sections": [{"name": name, "folded": name in panels.FOLDED} for name in panels.SECTIONS],
        "notes": notes,
        "runs": [{**_run(run, axes), "hue": hue} for run, hue in zip(runs, panels.hues(runs)[1], strict=True)],
        "panels": [_panel(curves, runs, max_points) for curves in shown],
        "differences": differences(runs),
    }


def differences(runs: list[Run]) -> dict[str, Any]:
    """Rows of the configuration keys whose values differ; of a single run, all keys."""
    known = [run for run in runs if run.config]
    rows = []
    for key in sorted({key for run in known for key in run.config} - {"run_dir"}):
        values = [run.config.get(key, "–") for run in known]
        if len(known) == 1 or any(value != values[0] for value in values):
            rows.append([key, *(_cell(value) for value in values)])
    return {"runs": [run.name for run in known], "rows": rows}


def _run(run: Run, axes: dict[str, Axis]) -> dict[str, Any]:
    sources = {name: axis.source(run) for name, axis in axes.items() if name != "step"}
    tables = {axis: _points(thin.thin(source, MAX_POINTS)) for axis, source in sources.items() if source is not None}
    events = {kind: [e for e in run.events if e["event"] == kind] for kind in panels.EVENTS}
    strides = {kind: -(-len(found) // MAX_EVENTS) or 1 for kind, found in events.items()}  # evenly spread
    return {
        "name": run.name,
        "state": run.state,
        "about": run.about,
        "axes": tables,
        "events": {kind: [_event(e) for e in found[:: strides[kind]]] for kind, found in events.items()},
        "summary": summary(run),
    }


def summary(run: Run) -> dict[str, Any]:
    """The values of a run in the table of runs; None for what was not logged."""
    losses = [_last(s) for name, s in run.series.items() if name.startswith("eval/") and name.endswith("/CrossEntropyLoss")]
    count = {kind: sum(e["event"] == kind for e in run.events) for kind in panels.EVENTS}
    speed = run.series.get("throughput/tokens_per_second")
    seeds = [summary(seed) for seed in run.seeds if seed.last_step == run.last_step]
    values = {loss: [seed[loss] for seed in seeds if seed[loss] is not None] for loss in ("training", "validation")}
    return {
        "ranges": {loss: [min(found), max(found)] for loss, found in values.items() if len(found) > 1},
        "steps": run.last_step,
        "total_steps": run.total_steps,
        "tokens": _last(run.series.get("throughput/total_tokens")),
        "seconds": _last(run.elapsed),
        "training": _last(run.series.get("train/CrossEntropyLoss")),
        "validation": float(np.mean(losses)) if losses and None not in losses else None,
        "speed": None if speed is None else _json_float(np.nanmedian(speed.values)),
        "events": {kind: n for kind, n in count.items() if n and kind != "save"},
    }


def _panel(curves: Curves, runs: list[Run], max_points: int) -> dict[str, Any]:
    drawn = []
    for metric, name in curves.metrics.items():
        for i, run in enumerate(runs):
            if metric in run.series:
                drawn.append({"metric": metric, "name": name, "run": i, **_curve(run, metric, max_points)})
    limits = [run.config.get(curves.panel.limit) for run in runs]
    return {
        "title": curves.panel.title,
        "unit": curves.panel.shown_unit,
        "section": curves.panel.section,
        "log": curves.panel.log,
        "smooth": curves.panel.smooth,
        "limits": [{"run": i, "value": v} for i, v in enumerate(limits) if isinstance(v, (int, float))],
        "limit_name": curves.panel.limit_name,
        "curves": drawn,
    }


def _curve(run: Run, metric: str, max_points: int) -> dict[str, Any]:
    series, spread = run.series[metric], run.spread.get(metric)
    kept = thin.thin(series, max_points)
    curve: dict[str, Any] = _points(kept)
    if spread is not None:
        curve["low"], curve["high"] = (_points(ends)["value"] for ends in thin.spread(series, spread, max_points, 0))
    odd = {step: str(v) for step, v in zip(curve["step"], kept.values.tolist(), strict=True) if not math.isfinite(v)}
    if odd:
        curve["odd"] = odd
    if len(kept) < len(series):
        curve["mean"] = _points(thin.means(series, max_points // 4))
        if spread is not None:
            ends = (thin.means(Series(series.steps, values), max_points // 4) for values in spread)
            curve["mean"]["low"], curve["mean"]["high"] = (_points(end)["value"] for end in ends)
    return curve


def _points(series: Series) -> dict[str, list]:
    return {"step": series.steps.tolist(), "value": [_json_float(v) for v in series.values.tolist()]}


def _event(event: dict[str, Any]) -> dict[str, Any]:
    details = {k: v for k, v in event.items() if k not in ("event", "step", "time") and isinstance(v, (int, float, str))}
    return {"step": event["step"], "text": ", ".join(f"{k} {_cell(v)}" for k, v in details.items())}


def _last(series: Series | None) -> float | None:
    finite = [] if series is None else series.values[np.isfinite(series.values)]
    return float(finite[-1]) if len(finite) else None


def _json_float(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(value)


def _file(name: str) -> str:
    return files("olmo_train.curves").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js with a space in the links of its map credits, so that a search of the page for addresses that it would load
    finds none."""
    from plotly.offline import get_plotlyjs

    return re.sub(r"((?:href|src)=)([\"']https?:)", r"\1 \2", get_plotlyjs())

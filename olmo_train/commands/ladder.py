"""fit the losses of small runs, and forecast the loss of a larger one

ladder --fit runs.csv --column loss --forecast 7e9,2e12 [--json]      a table of runs: parameters, tokens and losses
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.commands.common import print_table
from olmo_train.errors import ConfigError
from olmo_train.formats import decimal, short

if TYPE_CHECKING:
    from olmo_train.predict.fit import Fit, Forecast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    table = "fit the runs of this table, with the columns parameters, tokens and one of losses"
    parser.add_argument("--fit", type=Path, metavar="FILE.csv", help=table)
    parser.add_argument("--column", metavar="NAME", help="the column of losses")
    parser.add_argument("--forecast", metavar="N,D", help="forecast the loss of a model with N parameters after D tokens")
    parser.add_argument("--json", action="store_true", help="print fit and forecast as JSON")


def run(arguments: argparse.Namespace) -> None:
    from olmo_train.predict import fit

    target = target_of(arguments.forecast)
    if arguments.fit is None:
        raise ConfigError("--fit", "is missing; name a CSV file of runs, with the columns parameters, tokens and one of losses")
    points = fit.read_points(arguments.fit, arguments.column)
    points.check("--fit", f"add runs to {arguments.fit}")
    found = fit.fit(points)
    forecast = found.forecast(*target) if target else None
    if arguments.json:
        print(json.dumps({"forecast": forecast and vars(forecast), "fit": found.record()}, indent=1))
        return
    show_fit(found)
    if forecast:
        show_forecast(found, forecast)


def target_of(text: str | None) -> tuple[float, float] | None:
    """Parameters and tokens of --forecast N,D. Raises ConfigError."""
    if text is None:
        return None
    try:
        parameters, tokens = (float(part) for part in text.split(","))
    except ValueError:
        parameters = tokens = math.nan
    if not all(math.isfinite(value) and value > 0 for value in (parameters, tokens)):
        raise ConfigError("--forecast", f"'{text}' is not N,D; write parameters and tokens above 0, such as 7e9,2e12")
    return parameters, tokens


def show_fit(fit: Fit) -> None:
    """The law with its intervals, and the residual of each run."""
    points = fit.points
    print("L(N, D) = E + A / N^a + B / D^b, N parameters, D tokens\n")
    rows = [[name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*fit.intervals[name])] for name, value in fit.parameters.items()]
    print_table(["", "fit", "90%"], rows)
    fitted = fit.loss(points.parameters, points.tokens)
    rows = [
        [short(n), short(d), f"{d / n:.3g}", decimal(loss), decimal(law), f"{100 * residual:+.2f}%"]
        for n, d, loss, law, residual in zip(points.parameters, points.tokens, points.losses, fitted, fit.residuals, strict=True)
    ]
    print_table(["parameters", "tokens", "D / N", "loss", "fit", "residual"], rows, title="Runs")
    print(f"\nnoise around the fit: {100 * fit.noise:.2f}%")


def show_forecast(fit: Fit, forecast: Forecast) -> None:
    """The forecast in one line, and whether it separates the target from the best run."""
    points = fit.points
    at = f"{short(forecast.parameters)} parameters, {short(forecast.tokens)} tokens"
    print(f"forecast for {at}: {forecast.loss:.4f} ({forecast.low:.4f} to {forecast.high:.4f}, 90%)")
    times = forecast.parameters * forecast.tokens / (points.parameters * points.tokens).max()
    print(f"its compute is {times:.3g} times that of the largest run")
    best = float(points.losses.min())
    if forecast.high >= best:
        print(f"cannot tell whether it is below the loss of the best run, {best:.4f}; add sizes or multiples")

"""train small models for several lengths, fit their losses, and forecast the loss of a larger one

ladder my-run.yaml run_dir=runs/ladder --sizes 64x2,96x3,128x4 --multiples 1,2,4 --forecast 512x8,2e9
ladder --check runs/ladder/large                                      compare the finished run with its forecast
ladder --fit runs.csv --column loss --forecast 7e9,2e12 [--json]      a table of runs: parameters, tokens and losses
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.commands.common import add_config_arguments, check_counts, print_table, split_config
from olmo_train.curves.write import check_format
from olmo_train.errors import ConfigError
from olmo_train.formats import amount, counted, decimal, duration, short

if TYPE_CHECKING:
    from olmo_train.predict.fit import Fit, Forecast
    from olmo_train.predict.ladder import Measured, Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, nargs="*")
    sizes = "at least three: d_model x n_layers, such as 128x4, or YAML files"
    parser.add_argument("--sizes", metavar="SIZE,SIZE,...", help=sizes)
    multiples = "lengths of each size, in multiples of 20 tokens per parameter (default: 1,2,4)"
    parser.add_argument("--multiples", default="1,2,4", metavar="M,M,...", help=multiples)
    share = "share of a run in which the learning rate falls (default: 0.2)"
    parser.add_argument("--decay", type=float, default=0.2, metavar="SHARE", help=share)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="train N runs at a time (default: 1)")
    parser.add_argument("--metric", metavar="NAME", help="fit this metric (default: the first validation loss)")
    how = "print the commands, or an array for sbatch, and train nothing"
    parser.add_argument("--print", nargs="?", const="commands", choices=("commands", "slurm"), help=how)
    target = "forecast the loss of a model with N parameters, or of a size as in --sizes, after D tokens"
    parser.add_argument("--forecast", metavar="N,D", help=target)
    parser.add_argument("--gpu", metavar="NAME", help="the GPU of that model, such as h100, for time and cost")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of its GPUs (default: 1)")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed fraction of the GPU's peak (default: 0.4)")
    parser.add_argument("--price", type=float, metavar="MONEY", help="price of a GPU-hour")
    parser.add_argument("--check", type=Path, metavar="RUN_DIR", help="compare this finished run with its forecast")
    table = "fit the runs of this table, with the columns parameters, tokens and one of losses"
    parser.add_argument("--fit", type=Path, metavar="FILE.csv", help=table)
    parser.add_argument("--column", metavar="NAME", help="the column of losses")
    where = "the page or picture to write: .html, .png, .svg or .pdf (default: ladder.html in the folder of the runs)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=where)
    parser.add_argument("--json", action="store_true", help="print fit and forecast as JSON")


def run(arguments: argparse.Namespace) -> int:
    check_counts(arguments, "jobs", "gpus")
    if arguments.output:
        check_format(arguments.output)
    for option in ("decay", "mfu"):
        if not 0 < getattr(arguments, option) < 1:
            raise ConfigError(f"--{option}", f"is a share between 0 and 1, got {getattr(arguments, option):g}")
    if arguments.check:
        return check(arguments)
    if arguments.fit:
        return fit_table(arguments)
    return climb(arguments)


def fit_table(arguments: argparse.Namespace) -> int:
    """--fit FILE.csv"""
    from olmo_train.predict import fit
    from olmo_train.predict.ladder import target_of

    target = target_of(arguments.forecast, [], []) if arguments.forecast else None
    points = fit.read_points(arguments.fit, arguments.column)
    points.check("--fit", f"add runs to {arguments.fit}")
    names = [f"{d / n:.3g} tokens per parameter" for n, d in zip(points.parameters, points.tokens, strict=True)]
    show(arguments, Report(fit.fit(points), target, names), arguments.output)
    return 0


def climb(arguments: argparse.Namespace) -> int:
    """Train what is not trained, then fit."""
    from olmo_train.predict import fit, sweep
    from olmo_train.predict import ladder as ladders

    files, words = split_config(arguments.config)
    ladder = ladders.plan_ladder(files, words, parts(arguments.sizes or ""), numbers(arguments.multiples), arguments.decay)
    target = ladders.target_of(arguments.forecast, files, words) if arguments.forecast else None
    if arguments.print:
        print(sweep.script(arguments.print, ladder.folder, ladder.points), end="")
        return 0
    share = 100 * ladder.tokens / ladder.separate_tokens
    say = (lambda line: None) if arguments.json else (lambda line: print(line, flush=True))
    say(f"{counted(len(ladder.points), 'run')} in {ladder.folder}: {short(ladder.tokens)} tokens, {share:.0f}% of separate runs")
    codes = sweep.train_points(ladder.points, arguments.jobs, say)
    if sweep.STOPPED in codes:
        say("stopped after saving; run the same command again to resume")
        return sweep.STOPPED
    done = {point.run_dir for point, code in zip(ladder.points, codes, strict=True) if code == 0}
    metric = sweep.metric_of(ladder.rungs[0].point.config, arguments.metric)
    measured = ladders.measure([rung for rung in ladder.rungs if rung.point.run_dir in done], metric)
    measured.points.check(ladder.folder, "see the errors above, and run the same command again")
    measured.write_table(ladder.folder / "ladder.csv")
    found = fit.fit(measured.points, sizes_share=True)
    report = Report(found, target, [rung.name for rung in measured.rungs], metric, measured)
    if report.forecast:
        record = ladders.write_forecast(ladder.folder, measured, found, report.forecast)
        report.inputs_sha256 = record["inputs_sha256"]
    show(arguments, report, arguments.output or ladder.folder / "ladder.html")
    return int(any(codes))


def check(arguments: argparse.Namespace) -> int:
    """--check RUN_DIR"""
    from olmo_train import config as configuration
    from olmo_train.predict.ladder import check as compare

    folder = (
        configuration.decoded(configuration.read(*split_config(arguments.config))).get("run_dir") if arguments.config else None
    )
    found = compare(arguments.check, folder and Path(folder))
    forecast = found.record["forecast"]
    print(f"{found.record['metric']} of {arguments.check}: {found.loss:.4f}")
    print(f"forecast: {forecast['loss']:.4f} ({forecast['low']:.4f} to {forecast['high']:.4f}, 90%), {100 * found.error:+.2f}%")
    print("inside the interval" if found.is_inside else "outside the interval")
    for note in found.notes:
        print(f"note: {note}")
    return 0


def parts(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[float]:
    """Raises ConfigError."""
    try:
        found = [float(part) for part in parts(text)]
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(number) and number > 0 for number in found):
        raise ConfigError("--multiples", f"'{text}' is no list of numbers above 0; write them as 1,2,4")
    return found


@dataclass
class Report:
    """What is printed, and what the page shows."""

    fit: Fit
    target: Target | None
    names: list[str]  # of the runs
    metric: str = "loss"
    measured: Measured | None = None  # the runs, unless they are rows of a table
    inputs_sha256: str = ""  # of the files that the forecast rests on

    @cached_property
    def forecast(self) -> Forecast | None:
        """Of the target."""
        return self.fit.forecast(self.target.parameters, self.target.tokens) if self.target else None

    @property
    def doubt(self) -> str:
        """Why the forecast says nothing."""
        return self.fit.doubt(self.forecast) if self.forecast else ""

    def law(self) -> list[list[str]]:
        """The columns, and a row for each of E, A, B, a, b."""
        rows = [
            [name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*self.fit.intervals[name])] for name, value in self.fit.law.items()
        ]
        return [["", "fit", "90%"], *rows]

    def runs(self) -> list[list[str]]:
        """The columns, and a row for each run."""
        points = self.fit.points
        fitted = self.fit.loss(points.parameters, points.tokens)
        columns = (self.names, points.parameters, points.tokens, points.losses, fitted, self.fit.residuals)
        rows = [
            [name, short(n), short(d), decimal(loss), decimal(law), f"{100 * residual:+.2f}%"]
            for name, n, d, loss, law, residual in zip(*columns, strict=True)
        ]
        return [["run", "parameters", "tokens", "loss", "fit", "residual"], *rows]

    def facts(self, arguments: argparse.Namespace) -> list[str]:
        """The lines about the forecast."""
        lines = [f"{self.metric}, {counted(len(self.names), 'run')}; noise around the fit {100 * self.fit.noise:.2f}%"]
        if self.forecast and self.target:
            at = f"{short(self.forecast.parameters)} parameters, {short(self.forecast.tokens)} tokens"
            found = f"{self.forecast.loss:.4f} ({self.forecast.low:.4f} to {self.forecast.high:.4f}, 90%)"
            lines.append(f"forecast for {at}: {found}")
            lines.append(f"its compute is {self.fit.times_largest(self.forecast):.3g} times that of the largest run")
            lines.append(cost_line(self.target, arguments, self.measured))
        if self.inputs_sha256:
            lines.append(f"inputs: sha256 {self.inputs_sha256}")
        return lines


def cost_line(target: Target, arguments: argparse.Namespace, measured: Measured | None) -> str:
    """The planner's time, energy and money for the target; without a GPU the time at the speed of a run that was measured."""
    from olmo_train.plan.plan import choose_gpu
    from olmo_train.plan.time import Assumptions, cost_of

    gpu = choose_gpu(arguments.gpu, None, None, None)
    if gpu is None:
        speed = measured.speed if measured else None
        time = f": {duration(target.flops / speed[1])} at the speed of {speed[0]}" if speed else ""
        return f"it trains with {short(target.flops)} FLOPs{time}; name its GPU with --gpu for time and cost"
    cost = cost_of(target.flops, target.tokens, arguments.gpus, gpu, Assumptions(arguments.mfu, arguments.price))
    money = f", {cost.money:,.0f} at {arguments.price:g} a GPU-hour" if cost.money is not None else ""
    where = f"{arguments.gpus} x {gpu.name} at {arguments.mfu:.0%} of the peak"
    hours = f"{duration(cost.seconds)}, {short(cost.gpu_hours)} GPU-hours, {amount(cost.kwh, 'kWh', 'MWh')}"
    return f"it trains with {short(target.flops)} FLOPs: on {where} {hours}{money}"


def show(arguments: argparse.Namespace, report: Report, output: Path | None) -> None:
    """The report as JSON or as tables, and the page or the picture."""
    if arguments.json:
        print(json.dumps({"forecast": report.forecast and vars(report.forecast), "fit": report.fit.record()}, indent=1))
    else:
        law, runs = report.law(), report.runs()
        print("\nL(N, D) = E + A / N^a + B / D^b, N parameters, D tokens\n")
        print_table(law[0], law[1:])
        print_table(runs[0], runs[1:], title="Runs")
        print("", *report.facts(arguments), *filter(None, [report.doubt]), sep="\n")
    if output:
        from olmo_train.predict import ladder_page as page

        if output.suffix == ".html":
            tables = {"Runs": report.runs(), "L(N, D) = E + A / N^a + B / D^b": report.law()}
            page.write_page(output, report.fit, report.forecast, report.facts(arguments), report.doubt, tables)
        else:
            page.write_picture(report.fit, report.forecast, output)
        if not arguments.json:
            print(output)

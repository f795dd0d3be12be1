"""train a configuration with several values of some keys, and compare the losses

sweep my-run.yaml run_dir=runs/lr optim.peak_lr=1e-3,3e-3,1e-2 --seeds 3
sweep my-run.yaml run_dir=runs/two optim.peak_lr=1e-3,3e-3 optim.weight_decay=0,0.1 --jobs 2
sweep my-run.yaml run_dir=runs/lr optim.peak_lr=1e-3,3e-3 --print slurm > array.sh
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from olmo_train.commands.common import add_config_arguments, check_counts, print_table, split_config
from olmo_train.errors import DataError
from olmo_train.formats import counted, decimal

if TYPE_CHECKING:
    from olmo_train.predict.compare import Row
    from olmo_train.predict.sweep import Point, Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each choice with N seeds (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="train N runs at a time (default: 1)")
    parser.add_argument("--metric", metavar="NAME", help="compare this metric (default: the first validation loss)")
    how = "print the commands, or an array for sbatch, and train nothing"
    parser.add_argument("--print", nargs="?", const="commands", choices=("commands", "slurm"), help=how)


def run(arguments: argparse.Namespace) -> int:
    from olmo_train.predict import sweep as runs

    check_counts(arguments, "seeds", "jobs")
    sweep = runs.plan_sweep(*split_config(arguments.config), arguments.seeds)
    if arguments.print:
        print(runs.script(arguments.print, sweep.folder, sweep.points), end="")
        return 0
    print(f"{counted(len(sweep.points), 'run')} in {sweep.folder}")
    codes = runs.train_points(sweep.points, arguments.jobs, lambda line: print(line, flush=True))
    if runs.STOPPED in codes:
        print("stopped after saving; run the same command again to resume")
        return runs.STOPPED
    finished = [point for point, code in zip(sweep.points, codes, strict=True) if code == 0]
    show(sweep, finished, runs.metric_of(sweep.points[0].config, arguments.metric))
    return int(any(codes))


def show(sweep: Sweep, finished: list[Point], metric: str) -> None:
    """The table, the picture and which value is best."""
    from olmo_train.predict.compare import Row, draw, judge
    from olmo_train.predict.sweep import result

    losses: dict[tuple[str, ...], dict[int, float]] = {}
    for point in finished:
        try:
            losses.setdefault(point.values, {})[point.config.seed] = result(point, metric)
        except DataError as problem:
            print(f"note: {problem}")
    if not losses:
        print("no run has a result")
        return
    rows = [Row(values, found) for values, found in losses.items()]
    print(f"\n{metric}")
    print_table([*sweep.keys, "seeds", "mean", "lowest", "highest", "95% of the mean"], [cells(row) for row in rows])
    print(judge(sweep.keys, rows))
    draw(sweep.keys, rows, metric, sweep.folder / "sweep.png")
    print(sweep.folder / "sweep.png")


def cells(row: Row) -> list[str]:
    """A row of the table."""
    low, high = row.interval or (None, None)
    found = row.losses.values()
    between = "-" if low is None else f"{decimal(low)} to {decimal(high)}"
    return [*row.values, str(len(row.losses)), decimal(row.mean), decimal(min(found)), decimal(max(found)), between]

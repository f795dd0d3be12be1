"""Draw the curves of runs: in the terminal, as a page that needs no server, or as a figure for a paper.

curves runs/tiny                                 in the terminal; --follow watches a live run
curves runs/                                     all runs below a folder
curves runs/tiny --serve                         a live page at http://localhost, until Ctrl-C
curves runs/a runs/b --output compare.html       zoom, smoothing, log axes, x by tokens or time
curves runs/tiny history.csv --output loss.svg --metric 'eval/*/CrossEntropyLoss'
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.errors import ConfigError, DataError
from olmo_train.log.console import has_color, is_terminal

if TYPE_CHECKING:
    from olmo_train.curves.panels import Curves, View
    from olmo_train.curves.runs import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run_dir, a folder of them, or a W&B history as .csv or .jsonl"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write .html, .png, .svg or .pdf instead of the terminal")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="draw only this metric; * ? [] stand for text; may be repeated",
    )
    parser.add_argument("--x", choices=("step", "tokens", "flops", "time"), default="step", help="the x axis (default: step)")
    parser.add_argument("--log-x", action="store_true", help="a logarithmic x axis")
    parser.add_argument("--smooth", type=float, default=0, metavar="STEPS", help="average over about N steps on each side")
    parser.add_argument(
        "--label", action="append", default=[], metavar="NAME", help="what to call a run; once for each, in order"
    )
    parser.add_argument(
        "--each-seed", action="store_true", help="draw each run; runs that differ only in their seed are else their mean"
    )
    parser.add_argument("--follow", action="store_true", help="draw again whenever the run logs, until it ends or Ctrl-C")
    parser.add_argument(
        "--serve", nargs="?", type=int, const=0, metavar="PORT", help="a live page on this computer, at this port or a free one"
    )


def run(args: argparse.Namespace) -> None:
    if args.output:
        from olmo_train.curves.write import check_format

        check_format(args.output)
        if args.follow or args.serve is not None:
            raise ConfigError(
                "--output", "writes a file; leave out --output for --follow (in the terminal) or --serve (in a browser)"
            )
    if args.smooth < 0:
        raise ConfigError("--smooth", f"must be at least 0 steps, got {args.smooth:g}")
    if args.serve is not None:
        _serve(args)
    elif args.follow:
        _follow(args)
    elif args.output:
        _write(args)
    else:
        print(_frame(args)[0])


def _choose(args: argparse.Namespace, first: tuple[str, ...]) -> tuple[list[Run], list[Curves], View]:
    """The runs, the panels of --metric or else those titled `first` (all if it is empty), and how they are drawn."""
    from olmo_train.curves import exports, panels

    runs = exports.read_runs(args.runs, args.label, args.each_seed)
    chosen = panels.choose(runs, args.metric)
    if first and not args.metric:
        chosen = [curves for curves in chosen if curves.panel.title in first] or chosen[:1]
    return runs, chosen, panels.View(panels.axis_of(runs, args.x), args.log_x, args.smooth)


def _write(args: argparse.Namespace) -> None:
    from olmo_train.curves import figure
    from olmo_train.curves.write import write_curves

    runs, chosen, view = _choose(args, () if args.output.suffix == ".html" else figure.FIRST)
    write_curves(runs, chosen, args.output, view)
    for run in runs:
        for note in run.notes:
            print(f"note: {note}", file=sys.stderr)
    print(args.output)


def _serve(args: argparse.Namespace) -> None:
    from olmo_train.curves.serve import serve

    def announce(address: str) -> None:
        print(f"{address}   Ctrl-C ends it", flush=True)

    serve(lambda: _choose(args, ()), args.serve, announce)


def _frame(args: argparse.Namespace) -> tuple[str, bool]:
    """The text for the terminal, and whether every run has ended."""
    from olmo_train.curves import terminal

    runs, chosen, view = _choose(args, terminal.FIRST)
    columns, rows = shutil.get_terminal_size()
    height = rows - 1 if is_terminal(sys.stdout) else None  # the last row is the prompt's
    look = terminal.Look(**vars(view), width=max(40, columns), height=height, color=has_color())
    return terminal.draw_terminal(runs, chosen, look), all(run.ended for run in runs)


def _follow(args: argparse.Namespace) -> None:
    """Draw whenever a run has logged; drawing takes at most a tenth of the time, however long the run."""
    clear = "\x1b[2J\x1b[H" if is_terminal(sys.stdout) else ""
    seen, ended = None, False
    try:
        while not ended:
            began = time.monotonic()
            files = [file for path in args.runs for file in _files(path)]
            now = [file.stat().st_mtime_ns if file.is_file() else 0 for file in files]
            if now != seen:
                try:
                    text, ended = _frame(args)
                    print(clear + text, flush=True)
                except DataError as problem:
                    if not all(path.exists() for path in args.runs):
                        raise
                    print(f"waiting: {problem}", flush=True)
            seen = now
            if not ended:
                time.sleep(max(1.0, 9 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        print()


def _files(path: Path) -> list[Path]:
    """The files whose growth shows that a run has logged."""
    from olmo_train.curves.exports import run_dirs

    return [run_dir / "metrics.jsonl" for run_dir in run_dirs(path)] if path.is_dir() else [path]

"""measure how fast a configuration trains on this machine"""

from __future__ import annotations

import argparse

from olmo_train.commands.common import add_config_arguments, check_counts, split_config
from olmo_train.formats import byte_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> None:
    import contextlib
    import json
    import sys

    from olmo_train.parallel import processes
    from olmo_train.tools import bench

    check_counts(arguments, "steps", "warmup")
    with contextlib.redirect_stdout(sys.stderr):  # the run's own lines: stdout is the figures'
        figures = bench.measure(*split_config(arguments.config), arguments.steps, arguments.warmup)
    if processes.rank() == 0:
        print(json.dumps(figures, indent=1) if arguments.json else table(figures))


def table(figures: dict) -> str:
    """The figures as lines of `name  value`."""
    mfu = "unknown: no peak is listed for this device"
    if figures["mfu"] is not None:
        mfu = f"{figures['mfu']:.1%} of {figures['peak_flops'] / 1e12:.1f} TFLOP/s"
    fastest, slowest = figures["step_seconds_min"], figures["step_seconds_max"]
    phases = "  ".join(f"{name} {seconds:.4f}" for name, seconds in figures["phase_seconds"].items())
    rows = {
        "device": figures["device"],
        "precision": figures["precision"],
        "compiled": "yes" if figures["compiled"] else "no",
        **({"attention": figures["attention"]} if figures["attention"] else {}),
        "speed": f"{figures['tokens_per_second']:,.0f} tokens/s",
        "step": f"{figures['step_seconds']:.4f} s (fastest {fastest:.4f}, slowest {slowest:.4f})",
        "phases": f"{phases} s",
        "work": f"{figures['flops_per_second'] / 1e12:.4g} TFLOP/s ({figures['flops_convention']})",
        "MFU": mfu,
        "peak memory": byte_size(figures["peak_memory_bytes"]),
        "first step after": f"{figures['first_step_seconds']:.1f} s",
    }
    return "\n".join(f"{name:<18}{value}" for name, value in rows.items())

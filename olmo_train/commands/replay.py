"""compute a logged step again and compare it, bit for bit"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from olmo_train.commands.common import watch
from olmo_train.formats import counted

if TYPE_CHECKING:
    from olmo_train.tools.replay import Replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, help="the step to compute again")
    what.add_argument("--audit", type=int, metavar="K", help="K logged steps at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of --audit's choice (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    import random
    from pathlib import Path

    from olmo_train.errors import ConfigError
    from olmo_train.tools import replay

    run_dir = Path(arguments.run_dir)
    steps = [arguments.step]
    if arguments.audit is not None:
        known = sorted(replay.logged_lines(run_dir))
        if not 1 <= arguments.audit <= len(known):
            raise ConfigError("--audit", f"must be 1 to {len(known)}, the number of logged steps, got {arguments.audit}")
        steps = sorted(random.Random(arguments.seed).sample(known, arguments.audit))
    results = [replay.replay(run_dir, step, lambda text: print(text, flush=True), watch) for step in steps]
    for result in results:
        show(result, sequences=arguments.audit is None)
    differing = [result.step for result in results if result.differing]
    print(f"equal to the last bit: {len(results) - len(differing)} of {counted(len(results), 'step')}")
    return 1 if differing else 0


def show(result: Replay, sequences: bool) -> None:
    """Print the logged metrics that differ beside the computed ones, and the loss of each sequence."""
    start, outcome = result.checkpoint or "the initial weights", "differs" if result.differing else "equal"
    print(f"step {result.step}, computed from {start}: {outcome}")
    for name in result.differing:
        print(f"  {name}: logged {result.logged.get(name)!r}, now {result.replayed.get(name)!r}")
    for source, instance, loss in result.sequences if sequences else ():
        mean = "no scored token       " if loss == 0 else f"{loss:9.4f} nats a token"
        print(f"  {mean}  {source} {instance}")

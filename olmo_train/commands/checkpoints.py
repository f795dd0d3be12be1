"""list, verify, prune or merge the checkpoints of a run

checkpoints runs/mine --verify
checkpoints runs/mine --merge last=5
checkpoints runs/mine --merge 1000,2000,3000 --weights 1,1,2
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with the hashes of its manifest; exit 4 on damage"
    )
    parser.add_argument("--prune", action="store_true", help="delete what the run's retention no longer keeps")
    parser.add_argument("--dry-run", action="store_true", help="with --prune: only list what would be deleted")
    steps = "save the mean of the weights of the newest K checkpoints, or of these steps, to RUN_DIR/merged"
    parser.add_argument("--merge", metavar="last=K|STEP,STEP,...", help=steps)
    parser.add_argument("--weights", metavar="W,W,...", help="with --merge: the weight of each checkpoint (default: equal)")


def run(arguments: argparse.Namespace) -> None:
    from olmo_train import config
    from olmo_train.checkpoint import folders as checkpoint
    from olmo_train.errors import CheckpointError, ConfigError, no_run
    from olmo_train.storage import lock_run_dir, problems_of, remove_folder
    from olmo_train.train_config import TrainConfig

    run_dir = Path(arguments.run_dir)
    if arguments.dry_run and not arguments.prune:
        raise ConfigError("--dry-run", "goes with --prune")
    if arguments.merge and (arguments.verify or arguments.prune):
        raise ConfigError("--merge", "verifies its checkpoints itself; leave out --verify and --prune")
    if arguments.weights and not arguments.merge:
        raise ConfigError("--weights", "goes with --merge")
    folders = checkpoint.committed(run_dir)
    if not folders:
        raise CheckpointError(run_dir, no_run(run_dir, "holds no checkpoint; name a run_dir that has saved one"))
    if arguments.merge:
        return merge(run_dir, arguments)
    retention = config.load(TrainConfig, [run_dir / "config.yaml"]).checkpoint
    damaged, best = {}, checkpoint.best_step(run_dir)
    listed = [(step, folder) for step, folder in folders.items()] + checkpoint.merged(run_dir)
    for step, folder in listed:
        problems = problems_of(folder) if arguments.verify else []
        if problems:
            damaged[folder] = problems
        own = folder in folders.values()
        marks = {"permanent": own and retention.is_permanent(step), "best": own and step == best, str(folder): not own}
        print(describe(step, folder, [name for name, holds in marks.items() if holds], problems if arguments.verify else None))
    if arguments.prune:
        with contextlib.nullcontext() if arguments.dry_run else lock_run_dir(run_dir):  # a run may be in progress
            for folder in checkpoint.superfluous(run_dir, retention):
                print(f"{'would delete' if arguments.dry_run else 'deleted'} {folder}")
                if not arguments.dry_run:
                    remove_folder(folder)
    if damaged:
        raise CheckpointError(next(iter(damaged)), f"is damaged, {len(damaged)} of {len(listed)} in all; delete by hand")


def merge(run_dir: Path, arguments: argparse.Namespace) -> None:
    """Save a merged checkpoint, and print its parents and its folder."""
    from olmo_train.checkpoint.merge import choose, merge
    from olmo_train.commands.common import watch

    chosen = choose(run_dir, arguments.merge, arguments.weights)
    print("mean of " + ", ".join(f"{folder.name} x {weight:g}" for folder, weight in chosen.items()))
    print(merge(run_dir, chosen, watch))


def describe(step: int, folder: Path, marks: list[str], problems: list[str] | None) -> str:
    """One line: step, size, when, what it is marked as, and whether it verifies."""
    import json
    import time

    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        world = json.loads((folder / "state.json").read_bytes())["world_size"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, which --verify reports
        world = "?"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
    parts = [f"step {step:>8}", f"{size / 1e6:>10.1f} MB", when, f"world {world}", *marks]
    if problems is not None:
        parts.append("damaged: " + "; ".join(problems) if problems else "verified")
    return "  ".join(parts)

"""list, verify or prune the checkpoints of a run"""

from __future__ import annotations

import argparse
import contextlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with the hashes of its manifest; exit 4 on damage"
    )
    parser.add_argument("--prune", action="store_true", help="delete what the run's retention no longer keeps")
    parser.add_argument("--dry-run", action="store_true", help="with --prune: only list what would be deleted")


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from olmo_train import config
    from olmo_train.checkpoint import folders as checkpoint
    from olmo_train.errors import CheckpointError, ConfigError, no_run
    from olmo_train.storage import lock_run_dir, problems_of, remove_folder
    from olmo_train.train_config import TrainConfig

    run_dir = Path(arguments.run_dir)
    if arguments.dry_run and not arguments.prune:
        raise ConfigError("--dry-run", "goes with --prune")
    folders = checkpoint.committed(run_dir)
    if not folders:
        raise CheckpointError(run_dir, no_run(run_dir, "holds no checkpoint; name a run_dir that has saved one"))
    retention = config.load(TrainConfig, [run_dir / "config.yaml"]).checkpoint
    damaged, best = {}, checkpoint.best_step(run_dir)
    for step, folder in folders.items():
        problems = problems_of(folder) if arguments.verify else []
        if problems:
            damaged[folder] = problems
        print(describe(step, folder, retention.is_permanent(step), step == best, problems if arguments.verify else None))
    if arguments.prune:
        with contextlib.nullcontext() if arguments.dry_run else lock_run_dir(run_dir):  # a run may be in progress
            for folder in checkpoint.superfluous(run_dir, retention):
                print(f"{'would delete' if arguments.dry_run else 'deleted'} {folder}")
                if not arguments.dry_run:
                    remove_folder(folder)
    if damaged:
        raise CheckpointError(next(iter(damaged)), f"is damaged, {len(damaged)} of {len(folders)} in all; delete by hand")


def describe(step: int, folder, permanent: bool, best: bool, problems: list[str] | None) -> str:
    """One line: step, size, when, whether it is permanent or the best, and whether it verifies."""
    import json
    import time

    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        world = json.loads((folder / "state.json").read_bytes())["world_size"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, which --verify reports
        world = "?"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
    parts = [f"step {step:>8}", f"{size / 1e6:>10.1f} MB", when, f"world {world}"]
    if permanent:
        parts.append("permanent")
    if best:
        parts.append("best")
    if problems is not None:
        parts.append("damaged: " + "; ".join(problems) if problems else "verified")
    return "  ".join(parts)

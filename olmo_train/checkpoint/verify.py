"""Verify checkpoints with all processes of a run: each hashes its share of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from olmo_train.deal import deal
from olmo_train.parallel.world import World
from olmo_train.storage import Expected, FileCheck, check_files

T = TypeVar("T")


def with_all_ranks(world: World, choose: Callable[[FileCheck], T]) -> T:
    """choose(check), called on rank 0; its result or its error on every rank. The other ranks help `check` until it returns.

    So what is chosen does not depend on the number of ranks, and a file that only one rank finds damaged is damaged for all.
    """

    def choose_and_release() -> T:
        try:
            return choose(lambda folder, expected: _check_together(world, (folder, expected)) or {})
        finally:
            _check_together(world, None)

    while not world.is_main and _check_together(world, None) is not None:
        pass
    return world.on_main(choose_and_release)


def _check_together(world: World, task: tuple[Path, Expected] | None) -> dict[str, str] | None:
    """The problems of the files of rank 0's task, on every rank; None when rank 0 has no task."""
    task = world.broadcast(task)
    if task is None:
        return None
    folder, expected = task
    owners = deal([size for size, _ in expected.values()], world.size)
    mine = {name: expected[name] for name, owner in zip(expected, owners, strict=True) if owner == world.rank}
    found = world.gather(check_files(folder, mine))
    return {
        name: f"{problem} (on rank {rank})" if rank else problem
        for rank, problems in enumerate(found)
        for name, problem in problems.items()
    }

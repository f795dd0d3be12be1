"""What to do when a device runs out of memory: a report of what held it, and the keys that help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from olmo_train.errors import UserError
from olmo_train.parallel import processes


class OutOfMemoryError(UserError):
    exit_code = 1


@contextlib.contextmanager
def explain_out_of_memory(folder: Path, micro_batch_size: int, checkpointing: str) -> Iterator[None]:
    """Turn torch's error into one that says what to change. On a GPU it first writes a memory summary to `folder`, and torch's
    snapshot for pytorch.org/memory_viz. Raises OutOfMemoryError."""
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, torch.OutOfMemoryError) and "can't allocate memory" not in str(problem):  # from the CPU
            raise
        rank = processes.rank()
        left = f"; what it held is in {folder}" if _write_memory(folder, rank) else ""
        ways = ways_out(micro_batch_size, checkpointing)
        raise OutOfMemoryError("micro_batch_size", f"{_first_line(problem)}{left}; {ways}") from problem


def ways_out(micro_batch_size: int, checkpointing: str) -> str:
    """Changes that save memory and do not change what is learned, the most expensive last."""
    ways = [f"a micro_batch_size below {micro_batch_size}"] if micro_batch_size > 1 else []
    if checkpointing != "full":
        better = "selective or full" if checkpointing == "none" else "full"
        ways.append(f"parallel.activation_checkpointing={better}")
    ways.append("more processes")
    return f"use {', or '.join(ways)}; `olmo-train plan` shows how much each takes"


def _first_line(problem: Exception) -> str:
    first = (str(problem).splitlines() or ["out of memory"])[0]
    return first[first.find("DefaultCPUAllocator") if "DefaultCPUAllocator" in first else 0 :].partition(". GPU ")[0].rstrip(".")


def _write_memory(folder: Path, rank: int) -> bool:
    """Write what the GPU's memory holds; False without a GPU."""
    if not torch.cuda.is_available():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank:04d}.txt").write_text(torch.cuda.memory_summary(), encoding="utf-8")
    torch.cuda.memory._dump_snapshot(str(folder / f"rank-{rank:04d}.pickle"))
    return True

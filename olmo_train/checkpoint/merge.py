"""Merge checkpoints of a run into a new one, whose weights are the mean of theirs.

The mean of several checkpoints of the stable phase comes close to a decayed learning rate (Hägele et al. 2024; Li et al. 2025).
It is computed in fp64 and rounded once, one tensor at a time, from full tensors: the result does not depend on the number of
processes that saved the parents, and it takes the memory of one tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from olmo_train.checkpoint.folders import committed, read_state
from olmo_train.checkpoint.format import FORMAT
from olmo_train.checkpoint.load import WeightReader, check_shapes
from olmo_train.checkpoint.save import non_finite, safetensors_header
from olmo_train.errors import CheckpointError, ConfigError, SaveError, reason
from olmo_train.formats import counted
from olmo_train.storage import (
    MANIFEST,
    commit_folder,
    flush,
    hash_file,
    lock,
    problems_of,
    remove_folder,
    temporary_folder,
    write_file,
    write_pieces,
)

SHARD = "shard-00001.safetensors"


@dataclass(frozen=True)
class Parent:
    """A checkpoint that goes into the mean, as the manifest of the result names it."""

    path: str
    step: int
    weight: float
    manifest_sha256: str


def choose(run_dir: Path, text: str, weights: str | None = None) -> dict[Path, float]:
    """{checkpoint folder: weight}, oldest first, of `last=K` or `STEP,STEP,...`; equal weights, or `W,W,...` in the order of the
    steps as written. Raises ConfigError."""
    folders = committed(run_dir)
    there = f"{run_dir} has {counted(len(folders), 'checkpoint')}: {', '.join(map(str, folders)) or 'none'}"
    if text.startswith("last="):
        word = text.removeprefix("last=")
        count = int(word) if word.isdecimal() else 0
        if not 2 <= count <= len(folders):
            raise ConfigError("--merge", f"{text} must name at least 2 checkpoints, and no more than there are; {there}")
        steps = list(folders)[-count:]
    else:
        if not all(word.strip().isdecimal() for word in text.split(",")):
            raise ConfigError("--merge", f"{text} is neither last=K nor a list of steps; write last=5 or 100,200,300")
        steps = [int(word) for word in text.split(",")]
        if len(steps) < 2 or len(set(steps)) < len(steps):
            raise ConfigError("--merge", f"{text} must name at least 2 different steps; {there}")
        if missing := [step for step in steps if step not in folders]:
            raise ConfigError("--merge", f"there is no checkpoint of step {missing[0]}; {there}")
    shares = [1.0] * len(steps) if weights is None else _weights(weights, len(steps))
    return {folders[step]: share for step, share in sorted(zip(steps, shares, strict=True))}


def _weights(text: str, count: int) -> list[float]:
    """Raises ConfigError unless there are `count` finite weights above 0."""
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        what = f"{text} must be {count} finite numbers above 0, one for each checkpoint"
        raise ConfigError("--weights", f"{what}; write {','.join('1' * count)} for equal ones")
    return weights


Watch = Callable[[Iterable[str], str, int], Iterable[str]]


def merge(run_dir: Path, chosen: dict[Path, float], watch: Watch = lambda names, what, total: names) -> Path:
    """Commit the mean of the weights of these checkpoints, {folder: weight}, to RUN_DIR/merged, and return its folder, which is
    named by its parents. If it is there already, nothing is done. `watch` passes the names of the tensors on, and shows progress.

    Raises CheckpointError when a parent is damaged, has other tensors than the newest one or a value that is not finite, and
    SaveError when the result cannot be written.
    """
    for folder in chosen:
        if problems := problems_of(folder):
            raise CheckpointError(folder, f"is damaged: {'; '.join(problems)}; merge other checkpoints")
        if "base" in read_state(folder):
            what = "holds adapters alone, and a mean of A and B is not that of B A"
            raise CheckpointError(folder, f"{what}; merge each into its base first: olmo-train convert merge {folder} DEST")
    parents = [Parent(str(f.absolute()), read_state(f)["step"], w, hash_file(f / MANIFEST)) for f, w in chosen.items()]
    digest = hashlib.sha256(json.dumps([(p.manifest_sha256, p.weight) for p in parents]).encode()).hexdigest()
    final = run_dir / "merged" / f"step-{parents[-1].step:07d}-mean-{digest[:8]}"
    readers = {folder: WeightReader(folder) for folder in chosen}
    newest = list(chosen)[-1]
    for folder, reader in readers.items():
        check_shapes(folder, reader.shapes(), readers[newest].shapes())
    with _writing(final) as temporary:
        if temporary:
            entries = _write(temporary, readers, chosen, watch)
            commit_folder(temporary, final, entries, parents=[asdict(parent) for parent in parents])
    return final


@contextlib.contextmanager
def _writing(final: Path) -> Iterator[Path | None]:
    """A temporary folder to write in, one process at a time; None if `final` is there already. Nothing stays behind an error."""
    try:
        if not final.parent.is_dir():
            final.parent.mkdir(exist_ok=True)
            flush(final.parent.parent)
        with lock(final.parent / ".lock"):
            for leftover in final.parent.glob(".step-*"):  # of a merge that was killed
                remove_folder(leftover)
            if final.is_dir() and not problems_of(final):
                yield None
                return
            if final.is_dir():  # damaged
                remove_folder(final)
            temporary = temporary_folder(final)
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as problem:
        raise SaveError(final, f"could not be written: {reason(problem)}") from problem


def _write(temporary: Path, readers: dict[Path, WeightReader], chosen: dict[Path, float], watch: Watch) -> dict[str, Any]:
    """Write the files of the merged checkpoint; returns their manifest entries. It has the configuration and the tokenizer of
    the newest parent, and no optimizer state."""
    newest = list(chosen)[-1]
    shapes = readers[newest].shapes()
    blank = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    offsets = {name: {"saved_offsets": [0] * len(shape)} for name, shape in shapes.items()}

    def pieces() -> Iterator[bytes | memoryview]:
        yield safetensors_header(blank, offsets)
        for name in watch(shapes, "merging", len(shapes)):
            mean = _mean(name, readers, chosen)
            yield memoryview(mean.view(-1).view(torch.uint8).numpy())

    entries = {SHARD: write_pieces(temporary / SHARD, pieces(), ahead=2)}
    state = read_state(newest) | {"format": FORMAT, "optimizer_steps": None, "world_size": 1}
    state |= {"interval": None, "pending_line": None, "spikes": None, "best": None}
    entries["state.json"] = write_file(temporary / "state.json", json.dumps(state, indent=1).encode())
    for name in json.loads((newest / MANIFEST).read_bytes())["files"]:
        if name != "state.json" and not name.endswith(".safetensors"):
            entries[name] = write_file(temporary / name, (newest / name).read_bytes())
    return entries


def _mean(name: str, readers: dict[Path, WeightReader], chosen: dict[Path, float]) -> Tensor:
    """The weighted mean of one tensor, fp32. `name` begins with `model.`"""
    total = None
    for folder, reader in readers.items():
        try:
            tensor = reader(name.removeprefix("model."))
        except (OSError, CheckpointException) as problem:
            if folder.is_dir():
                raise
            what = "was deleted while it was merged; merge again, or keep it with checkpoint.permanent_interval_steps"
            raise CheckpointError(folder, what) from problem
        if non_finite({name: tensor}):
            raise CheckpointError(folder, f"{name} holds values that are not finite; merge other checkpoints")
        term = tensor.double().mul_(chosen[folder])
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.div_(sum(chosen.values())).float()

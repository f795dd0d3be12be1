"""Decide what a run starts from: a fresh model, the newest checkpoint of its run_dir, or a checkpoint of another run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from olmo_train import config as configuration
from olmo_train.checkpoint import folders
from olmo_train.data.mixture import Mixture
from olmo_train.data.order import BatchSizes
from olmo_train.errors import ConfigError
from olmo_train.history import History
from olmo_train.run.resume import check_adapters, check_changes, check_data, check_denied, check_init, check_skip_steps
from olmo_train.storage import FileCheck, check_files
from olmo_train.train_config import BatchConfig, TrainConfig


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    kind: str  # start, resume or branch
    folder: Path | None  # the checkpoint to load; None for a fresh model
    state: dict[str, Any]  # state.json of that checkpoint
    saved: dict[str, Any]  # config.yaml of that checkpoint, as config.read returns it; empty for a fresh model
    batches: BatchSizes  # of the whole run: those of the checkpoint, then the configuration's
    # the checkpoint whose weights a fresh model starts with, or whose weights stay frozen under adapters
    init_folder: Path | None = None
    base: dict[str, Any] | None = None  # with adapters: what state.json says of init_folder

    @property
    def step(self) -> int:
        """The last step that is done."""
        return self.state["step"]

    @property
    def first_step(self) -> int:
        """The step before the run's own first one: 0, or the step that a branch leaves its parent at."""
        return self.step if self.kind == "branch" else 0

    @property
    def skipped_in_a_row(self) -> int:
        """How many steps in a row were skipped before the first one. Earlier versions saved it with the interval's counts."""
        counts = (self.state.get("interval") or {"counts": []})["counts"]
        return int(self.state.get("skipped_in_a_row", sum(counts[4:])))


class Found(NamedTuple):
    """The verified checkpoint that a run starts from."""

    kind: str  # start, resume or branch
    folder: Path | None = None  # as in Start
    init_folder: Path | None = None  # as in Start


def find_checkpoint(config: TrainConfig, check: FileCheck = check_files) -> Found:
    """The newest checkpoint of run_dir that verifies, else resume_from, else the weights of init_from, else nothing.

    Raises CheckpointError when run_dir has checkpoints and none verifies, or when resume_from or init_from is not a checkpoint.
    """
    folder, kind = folders.newest(Path(config.run_dir), config.resume == "strict", check), "resume"
    if folder is None and config.resume_from is not None:
        folder, kind = folders.resolve(Path(config.resume_from), check), "branch"
    if folder is not None:
        return Found(kind, folder, folders.base_of(folder, config.init_from, check))
    if config.init_from is None:
        if config.adapter.is_on:
            what = f"{config.adapter.kind} needs weights to freeze; set init_from to a checkpoint or a run_dir"
            raise ConfigError("adapter.kind", what)
        return Found("start")
    folder = folders.resolve(Path(config.init_from), check)
    if "base" in folders.read_state(folder):
        raise ConfigError("init_from", f"{folders.merge_first(folder)}, or continue to train them: resume_from={folder}")
    return Found("start", init_folder=folder)


def read_start(config: TrainConfig, mixture: Mixture, found: Found) -> tuple[TrainConfig, Start]:
    """Read the checkpoint that `find_checkpoint` found. Returns the configuration too, which takes the checkpoint's batch size if
    it sets none: a run keeps its batch, also one that an earlier version started with another default.

    Raises ConfigError when the configuration would train another model than the one that is resumed, or that init_from was, or on
    other data. A branch may change anything but the shapes of its adapters.
    """
    kind, folder, base = found.kind, found.folder, None
    if config.adapter.is_on and found.init_folder:
        base = folders.base_record(found.init_folder, config.parallel.precision)
    if folder is None:
        if found.init_folder:
            check_init(found.init_folder, config.model, config.allow_changes)
        return config, Start(kind, None, {"step": 0}, {}, config.batches, found.init_folder, base)
    state, words = folders.read_state(folder), configuration.read([folder / "config.yaml"])
    saved = configuration.decoded(words)
    if config.batch_is_unset and saved.get("batch_schedule"):
        rows = tuple(BatchConfig(**row) for row in saved["batch_schedule"])
        config = dataclasses.replace(config, global_batch_size=None, batch_schedule=rows)
    elif config.batch_is_unset and saved.get("global_batch_size"):  # a converted checkpoint has none
        config = dataclasses.replace(config, global_batch_size=saved["global_batch_size"])
    if kind == "resume":
        resolved = configuration.to_dict(config)
        check_changes(saved, resolved, config.allow_changes)
        check_skip_steps(saved, resolved, state["step"], config.allow_changes)
        check_data(state["data"], mixture.fingerprint, config.allow_changes)
        check_denied(state.get("denied"), mixture.denied_summary, config.allow_changes)
    check_adapters(folder, saved, config.adapter, are_there=found.init_folder is not None)
    # A checkpoint of an older version, or a converted one, has one batch size up to its step.
    changes = state.get("batches") or [(1, saved.get("global_batch_size") or config.batches.at(1))]
    batches = BatchSizes.of(changes).after(state["step"], config.batches)
    return config, Start(kind, folder, state, words, batches, found.init_folder, base)


def owed_line(run_dir: Path, start: Start) -> dict[str, Any] | None:
    """The metrics of the resumed step when a signal interrupted its evaluation and no attempt since has logged it.

    The checkpoint keeps the line for good, so metrics.jsonl decides. A branch does not log a step of its parent.
    """
    line = start.state.get("pending_line")
    return None if start.kind == "branch" or line is None or History(run_dir).line(start.step) else line

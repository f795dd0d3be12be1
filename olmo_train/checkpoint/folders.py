"""The checkpoint folders of a run_dir: list them, find the newest valid one, decide which to keep. Imports no torch."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.errors import CheckpointError, ConfigError, did_you_mean, near_files, reason
from olmo_train.storage import MANIFEST, FileCheck, check_files, hash_file, problems_of, remove_folder, replace_file

log = logging.getLogger(__name__)
FOLDER = re.compile(r"step-(\d{7,})")
MERGED = re.compile(r"step-(\d{7,})-mean-[0-9a-f]{8}")  # in run_dir/merged
BEST = "best.json"  # in run_dir, with checkpoint.keep_best: {"step", "metric", "value"}


def folder_of(run_dir: Path, step: int) -> Path:
    """The checkpoint folder of a step, whether or not it exists."""
    return run_dir / "checkpoints" / f"step-{step:07d}"


def committed(run_dir: Path) -> dict[int, Path]:
    """{step: folder} of the committed checkpoints of a run, oldest first."""
    root = run_dir / "checkpoints"
    found = {int(m[1]): path for path in root.glob("step-*") if (m := FOLDER.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items()))


def merged(run_dir: Path) -> list[tuple[int, Path]]:
    """(step of the newest parent, folder) of the merged checkpoints of a run; see merge.py."""
    return sorted((int(m[1]), path) for path in (run_dir / "merged").glob("step-*") if (m := MERGED.fullmatch(path.name)))


def _aside(folder: Path) -> Path:
    """The name of a checkpoint while a new one of the same step replaces it."""
    return folder.with_name(f".{folder.name}.old")


def put_back(run_dir: Path) -> None:
    """Undo a replacement that a kill interrupted, or remove the old folder of a finished one.

    Only under the run's lock: otherwise it would disturb a replacement of a live run.
    """
    for aside in (run_dir / "checkpoints").glob(".step-*.old"):
        final = aside.with_name(aside.name[1:].removesuffix(".old"))
        if os.path.lexists(final):
            remove_folder(aside)
        else:
            os.rename(aside, final)


def newest(run_dir: Path, strict: bool = False, check: FileCheck = check_files) -> Path | None:
    """The newest checkpoint that verifies; None if the run has no checkpoint. `check` compares the contents of its files.

    Damaged ones are skipped with a warning and not changed. Raises CheckpointError if there are checkpoints and none verifies;
    with `strict`, if the newest one does not verify.
    """
    folders = committed(run_dir)
    for folder in reversed(folders.values()):
        problems = problems_of(folder, check=check)
        if not problems:
            return folder
        if strict:
            raise CheckpointError(folder, f"is damaged: {'; '.join(problems)}; resume=auto would take the one before it")
        log.warning("%s is damaged and skipped: %s", folder, "; ".join(problems))
    if folders:
        raise CheckpointError(
            run_dir / "checkpoints",
            f"none of the {len(folders)} checkpoints verifies; restore one or choose another run_dir",
        )
    return None


def newest_folder(run_dir: Path) -> Path | None:
    """The newest committed checkpoint, not verified."""
    return next(reversed(committed(run_dir).values()), None)


def resolve(path: Path, check: FileCheck = check_files) -> Path:
    """The checkpoint folder at `path`, or the newest one of a run_dir at `path`. Raises CheckpointError."""
    if (path / "MANIFEST.json").is_file():
        problems = problems_of(path, check=check)
        if problems:
            raise CheckpointError(path, f"is damaged: {'; '.join(problems)}")
        return path
    folder = newest(path, check=check) if path.is_dir() else None
    if folder is None:
        raise CheckpointError(path, f"is neither a checkpoint folder nor a run_dir with a checkpoint; {_which_there_are(path)}")
    return folder


def _which_there_are(path: Path) -> str:
    """The checkpoints beside a folder that is none, such as one that retention has deleted, as the end of an error."""
    run_dir = next((folder.parent for folder in (path, path.parent) if folder.name == "checkpoints"), path)
    if steps := list(committed(run_dir)):
        several = f"s {', '.join(map(str, steps[:-1]))} and" if steps[1:] else ""
        there = f"{run_dir} has the checkpoint{'s' * bool(several)} of step{several} {steps[-1]}"
        return f"{there}; name {run_dir} for the newest, or a folder such as {folder_of(run_dir, steps[-1])}"
    if path.is_dir():
        return "name a run_dir that has saved one, or a folder RUN_DIR/checkpoints/step-NNNNNNN"
    return f"there is no such folder; {did_you_mean(near_files(path, '*/'), 'name a run_dir')}"


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises CheckpointError when it cannot be read."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            folder, f"state.json cannot be read: {reason(problem)}; all processes must see the same files"
        ) from problem


def write_best(run_dir: Path, best: dict[str, Any] | None) -> None:
    """Name the best checkpoint in best.json, if it is committed."""
    if best and folder_of(run_dir, best["step"]).is_dir():
        replace_file(run_dir / BEST, json.dumps(best).encode() + b"\n")


def best_step(run_dir: Path) -> int | None:
    """The step that best.json names; None without one."""
    try:
        return json.loads((run_dir / BEST).read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def base_record(base: Path, dtype: str) -> dict[str, Any]:
    """What state.json says of the checkpoint whose weights are frozen under adapters. `dtype`: the precision of compute."""
    sha256 = hash_file(base / MANIFEST)
    return {"path": str(base.absolute()), "step": read_state(base)["step"], "manifest_sha256": sha256, "dtype": dtype}


def base_of(folder: Path, init_from: str | None = None, check: FileCheck = check_files, key: str = "init_from") -> Path | None:
    """The checkpoint whose weights are frozen under the adapters of `folder`; None for a checkpoint without adapters.

    It is looked for at `init_from`, a checkpoint or a run_dir, then where it was. Raises ConfigError about `key`, which names
    init_from, when neither is there or init_from is another checkpoint, and CheckpointError when it is damaged.
    """
    record = read_state(folder).get("base")
    if record is None:
        return None
    named = [Path(init_from), folder_of(Path(init_from), record["step"])] if init_from else []
    for place in (*named, Path(record["path"])):
        if (place / MANIFEST).is_file():
            if (sha256 := hash_file(place / MANIFEST)) == record["manifest_sha256"]:
                return resolve(place, check)
            hashes = f"its manifest has the hash {sha256[:12]}, that of the base {record['manifest_sha256'][:12]}"
            what = f"{place} is not the checkpoint whose weights are frozen under the adapters of {folder}: {hashes}"
            raise ConfigError(key, f"{what}; name the checkpoint that was at {record['path']}")
    where = f"neither at {init_from} nor at {record['path']}" if init_from else f"not at {record['path']}"
    what = f"the base of {folder} is {where}, where it was when the adapters were trained"
    convert = f"olmo-train convert merge {folder} DEST --base PLACE"
    raise ConfigError(key, f"{what}; put it back, set init_from to its place, or for other verbs than train: {convert}")


def merge_first(folder: Path) -> str:
    """What to do with a checkpoint of adapters where one of all weights is needed."""
    return f"{folder} holds adapters alone; merge them into their base first: olmo-train convert merge {folder} DEST"


def superfluous(run_dir: Path, config: CheckpointConfig, last_step: int | None = None) -> list[Path]:
    """The checkpoints that retention deletes now: neither permanent, nor the best, nor among the newest keep_last complete ones.

    Checkpoints after `last_step`, the newest committed step, are damaged ones that loading skipped; they do not count. A
    checkpoint with a missing or truncated file neither counts nor is deleted.
    """
    folders, best = committed(run_dir), best_step(run_dir)
    passing = [step for step in folders if not config.is_permanent(step) and (last_step is None or step <= last_step)]
    passing = [step for step in passing if step != best]
    complete = [folders[step] for step in passing if not problems_of(folders[step], contents=False)]
    return complete[: -config.keep_last]

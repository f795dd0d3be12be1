"""Where a step's figures go. metrics.jsonl is the record of truth; W&B and TensorBoard mirror it and may fail.

One JSON object a line, each step once, floats written so that they read back bit for bit. Names are those of the public
OLMo runs, so that curves overlay.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo_train.errors import ConfigError, DataError, check_choice
from olmo_train.storage import replace_file

log = logging.getLogger(__name__)
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}  # WANDB_MODE
PATIENCE = 30  # seconds that a start or an end waits for W&B's server at most


@dataclass(frozen=True)
class WandbConfig:
    """What is set here wins over W&B's environment variables, which fill in what is not."""

    mode: str = "auto"  # auto: WANDB_DISABLED, WANDB_MODE, else online with a key, else offline; or online, offline, disabled
    project: str | None = None  # null: WANDB_PROJECT, else olmo-train
    entity: str | None = None  # null: WANDB_ENTITY
    group: str | None = None  # null: WANDB_RUN_GROUP
    name: str | None = None  # null: WANDB_NAME, else the run_dir's last part
    tags: tuple[str, ...] = ()  # none: WANDB_TAGS, by commas

    def __post_init__(self) -> None:
        check_choice("log.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass(frozen=True)
class LogConfig:
    interval_steps: int = 10  # a line in metrics.jsonl every so many steps
    tensorboard: bool = False  # mirror the metrics to run_dir/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ConfigError("log.interval_steps", f"must be at least 1, got {self.interval_steps}")


class JsonLines:
    """A file of one JSON object a line. What cannot be written, such as on a full disk, is kept and tried again with the
    next line, so that the file is complete as soon as there is room."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115, closed by close()
        self._cut_half_line()
        self._waiting = b""  # not on the disk yet
        self._warned = False

    def append(self, line: dict[str, Any]) -> None:
        self._waiting += json.dumps(_without_infinity(line), allow_nan=False).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as problem:
            if not self._warned:
                log.warning("%s cannot be written for now, its lines are kept in memory: %s", self.path, problem)
            self._warned = True

    def _cut_half_line(self) -> None:
        """Drop what a killed process has left behind the last line's end, so that the next line begins one."""
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def sync(self) -> None:
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as problem:
            log.warning("%s could not be flushed: %s", self.path, problem)

    def close(self) -> None:
        self._write()
        self._file.close()


def attempts(run_dir: Path) -> int:
    """How often a run was started so far, by its events."""
    file = run_dir / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return sum('"event": "start"' in line or '"event": "resume"' in line or '"event": "branch"' in line for line in lines)


def is_logged(run_dir: Path, step: int) -> bool:
    """Whether metrics.jsonl has the line of this step, complete with its line end."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return any(line.startswith(b'{"step": %d,' % step) and line.endswith(b"}\n") for line in lines)


class Recorder:
    """Writes metrics.jsonl and events.jsonl of a run_dir and mirrors the metrics. Made on rank 0 only."""

    def __init__(self, run_dir: Path, config: LogConfig, resolved: dict[str, Any], last_step: int):
        """`last_step`: the step that the run resumes from; what an earlier attempt logged beyond it is done again, so its
        lines are dropped."""
        self.path = run_dir / "metrics.jsonl"
        kept = self._drop_after(last_step)
        self._metrics, self._events = JsonLines(self.path), JsonLines(run_dir / "events.jsonl")
        self._mirrors = list(_mirrors(run_dir, config, resolved, last_step))
        for mirror in list(self._mirrors):  # what a killed attempt has logged and not mirrored
            missing = [line for line in kept if line["step"] > mirror.sent]
            self._try(mirror, last_step, lambda mirror=mirror, missing=missing: self._catch_up(mirror, missing, last_step))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics. A non-finite value is written as null."""
        line = {key: _finite(value) for key, value in {"step": step, "time": time.time(), **metrics}.items()}
        self._metrics.append(line)
        for mirror in list(self._mirrors):
            self._try(mirror, step, lambda mirror=mirror: mirror.log(step, _numbers(line)))

    def settle(self, step: int) -> None:
        """The checkpoint of this step is committed: no resume will compute the steps up to it again."""
        for mirror in list(self._mirrors):
            self._try(mirror, step, lambda mirror=mirror: mirror.settle(step))

    def _catch_up(self, mirror: WandbMirror | TensorboardMirror, lines: list[dict[str, Any]], last_step: int) -> None:
        for line in lines:
            mirror.log(line["step"], _numbers(line))
        mirror.settle(last_step)

    def _try(self, mirror: WandbMirror | TensorboardMirror, step: int, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as problem:
            log.warning("%s failed and is left out from step %d on: %s", mirror.name, step, problem)
            self._mirrors.remove(mirror)

    def event(self, event: str, step: int, **details: Any) -> None:
        line = {"event": event, "step": step, "time": time.time(), **details}
        self._events.append({key: _finite(value) for key, value in line.items()})

    def sync(self) -> None:
        """Make all lines survive a power cut: called before a checkpoint is committed."""
        self._metrics.sync()
        self._events.sync()

    def close(self) -> None:
        for mirror in self._mirrors:
            try:
                mirror.close()
            except Exception as problem:
                log.warning("%s could not be finished: %s", mirror.name, problem)
        self._metrics.close()
        self._events.close()

    def _drop_after(self, last_step: int) -> list[dict[str, Any]]:
        """Gives the lines that stay."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept, read = [], []
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                if values["step"] <= last_step:
                    kept.append(line)
                    read.append(values)
            except (ValueError, KeyError, TypeError) as problem:
                if number < len(lines):  # only the last line can be half-written
                    raise DataError(self.path, f"line {number} is not a line of metrics: {problem!r}") from problem
        if len(kept) < len(lines):
            replace_file(self.path, b"".join(kept))
        return read


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}


def _without_infinity(value: Any) -> Any:
    """A configuration's infinite number as `.inf`, as YAML spells it: JSON has none."""
    if isinstance(value, dict):
        return {key: _without_infinity(inner) for key, inner in value.items()}
    return str(value).replace("inf", ".inf") if isinstance(value, float) and math.isinf(value) else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mirrors(
    run_dir: Path, config: LogConfig, resolved: dict[str, Any], last_step: int
) -> Iterator[WandbMirror | TensorboardMirror]:
    if config.tensorboard:
        yield TensorboardMirror(run_dir, last_step)
    mode = wandb_mode(config.wandb)
    if mode != "disabled":
        try:
            mirror = WandbMirror(run_dir, config.wandb, mode, resolved)
        except Exception as problem:  # whatever ails it, training does not depend on it
            log.warning("W&B is left out: %s", problem)
        else:
            yield mirror


def wandb_mode(config: WandbConfig) -> str:
    """online, offline or disabled. `auto` follows the environment, else goes online when a key is at hand, and never asks."""
    if config.mode != "auto":
        return config.mode
    if os.environ.get("WANDB_DISABLED", "").strip().lower() not in ("", "0", "false", "no", "off"):
        return "disabled"
    if named := os.environ.get("WANDB_MODE", "").strip().lower():
        if named not in MODES:
            log.warning("WANDB_MODE '%s' is not one of %s; W&B stays offline", named, ", ".join(MODES))
        return MODES.get(named, "offline")
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(server_url()).hostname
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        return "online" if netrc.netrc().authenticators(host or "") else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def server_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def check_answers(url: str) -> None:
    """Raise OSError when nothing answers at a URL, with whatever: W&B's client takes far longer to find that out."""
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=PATIENCE / 3).close()
    except urllib.error.HTTPError:
        pass  # an answer too
    except urllib.error.URLError as problem:
        if not isinstance(problem.reason, ssl.SSLError):  # the client may know a certificate that we do not
            raise OSError(f"{url}: {problem.reason}") from problem


class WandbMirror:
    """The run on Weights & Biases, under one id over all restarts, with each step once (docs/decisions/0006).

    A line that may be computed again after a resume waits until a checkpoint covers it; online, where someone watches, it
    is sent at once. What a killed attempt had not delivered is sent again from metrics.jsonl.
    """

    name = "W&B"

    def __init__(self, run_dir: Path, config: WandbConfig, mode: str, resolved: dict[str, Any]):
        self._folder = run_dir / "wandb"
        self._folder.mkdir(exist_ok=True)
        self._unfinished, self._sent_file = self._folder / "unfinished", self._folder / "sent-step"
        id_file = self._folder / "run-id"
        self._leave_the_original(id_file)
        self._set_aside()
        if not id_file.exists():
            replace_file(id_file, uuid.uuid4().hex[:8].encode())
        self._waiting: list[tuple[int, dict[str, float]]] = []
        options = {
            "project": config.project or os.environ.get("WANDB_PROJECT") or "olmo-train",
            "entity": config.entity,  # None: the client looks at the environment by itself, as for group and tags
            "group": config.group,
            "name": config.name or os.environ.get("WANDB_NAME") or run_dir.resolve().name,
            "tags": list(config.tags) or None,
            "dir": str(run_dir),
            "id": id_file.read_text(encoding="utf-8"),
            "resume": "allow",
            "config": {**resolved, "code_version": code_version()},
        }
        self._run = self._begin(mode, options)
        replace_file(id_file, self._run.id.encode())  # an agent of a sweep names it itself
        self._live = not self._run.offline
        if self._live:  # the server knows what it has
            self.sent = self._run.starting_step - 1
        else:
            self.sent = int(self._sent_file.read_text(encoding="utf-8")) if self._sent_file.exists() else -1
            replace_file(self._unfinished, Path(self._run.dir).parent.name.encode())
        self._run.define_metric("throughput/total_tokens")  # offered as an x axis

    def _begin(self, mode: str, options: dict[str, Any]) -> Any:
        """The client's run; offline when the server cannot be reached, which the client by itself does not do."""
        if os.environ.get("WANDB_MODE", mode) not in MODES:
            os.environ["WANDB_MODE"] = mode  # the client fails on a spelling that it does not know
        os.environ.setdefault("WANDB_SILENT", "true")  # its own lines, before it has settings
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder.resolve()))  # everything lies under the run_dir
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # its telemetry fails aloud
        import wandb

        options["settings"] = wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE, silent=True)
        if mode == "online":
            try:
                check_answers(server_url())
                return wandb.init(mode=mode, **options)
            except Exception as problem:
                log.warning(
                    "W&B cannot be reached, this part of the run is recorded offline (wandb sync sends it later): %s",
                    " ".join(str(problem).split()),
                )
                wandb.teardown()  # or a failed attempt holds the run's id
        return wandb.init(mode="offline", **options)

    def _leave_the_original(self, id_file: Path) -> None:
        """In a copy of a run_dir, begin a new run on W&B, which gets the whole history: the id belongs to the original.

        A folder that was moved on one machine, or that another machine sees under the same path, is no copy.
        """
        place_file, here = self._folder / "run-place", {"host": socket.gethostname(), "path": str(self._folder.resolve())}
        if id_file.exists() and place_file.exists():
            was = json.loads(place_file.read_text(encoding="utf-8"))
            original = Path(was["path"], id_file.name)
            is_there = original.exists() and not original.samefile(id_file)
            if was["path"] != here["path"] and (was["host"] != here["host"] or is_there):
                log.warning("this run_dir is a copy of the one on %s at %s: W&B records it as a new run", *was.values())
                for record in self._folder.glob("offline-run-*"):  # `wandb sync` sends those of the original
                    record.rename(self._folder / f"copied-{record.name}")
                for file in (id_file, self._sent_file, self._unfinished):
                    file.unlink(missing_ok=True)
        replace_file(place_file, json.dumps(here).encode())

    def _set_aside(self) -> None:
        """Hide the offline record of an attempt that was killed from `wandb sync`: it lacks its end, which is only known
        to metrics.jsonl, from where all of its lines are sent again."""
        if self._unfinished.exists():
            record = self._folder / self._unfinished.read_text(encoding="utf-8")
            if record.is_dir():
                record.rename(self._folder / f"killed-{record.name}")
            self._unfinished.unlink()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step > self.sent:
            self._waiting.append((step, metrics))
        if self._live:
            self.settle(step)

    def settle(self, step: int) -> None:
        while self._waiting and self._waiting[0][0] <= step:
            self.sent, metrics = self._waiting.pop(0)
            self._run.log(metrics, step=self.sent, commit=True)

    def close(self) -> None:
        self._run.finish()
        replace_file(self._sent_file, str(self.sent).encode())
        self._unfinished.unlink(missing_ok=True)


class TensorboardMirror:
    """The metrics as TensorBoard event files under run_dir/tensorboard."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, last_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as problem:
            raise ConfigError(
                "log.tensorboard", "needs the package tensorboard; pip install 'olmo-train[tensorboard]'"
            ) from problem
        self.sent = last_step
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)  # what is computed again counts once

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name != "time":
                self._writer.add_scalar(name, value, global_step=step, walltime=metrics["time"])
        self._writer.flush()

    def settle(self, step: int) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self._writer.close()


def code_version() -> str | None:
    """The commit of the code that trains, with `+changes` when files differ from it; None outside a checkout."""
    try:
        changes = "+changes" if _git("status", "--porcelain", "-uno", ".") else ""
        return _git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    where = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, errors="replace", check=True, timeout=10)
    return done.stdout.strip()

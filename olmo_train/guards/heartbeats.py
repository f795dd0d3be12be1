"""The heartbeat files of a run: each rank writes its step and process, and reads those of the others."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from olmo_train.errors import ConfigError
from olmo_train.storage import replacing

STATES = {"T": "its process is stopped", "Z": "its process is dead", "X": "its process is gone"}  # of /proc/PID/stat


def new_heartbeats(run_dir: Path) -> Path:
    """A new folder for the heartbeats of this start of a run; removes those of earlier starts."""
    heartbeats = run_dir / ".heartbeats"
    shutil.rmtree(heartbeats, ignore_errors=True)
    return heartbeats / uuid.uuid4().hex[:8]


class Heartbeats:
    """The heartbeats of all ranks in one folder. Only the watchdog's thread and `close` write."""

    def __init__(self, folder: Path, rank: int, size: int):
        """Raises ConfigError if the folder cannot be written."""
        self.folder, self.rank, self.size = folder, rank, size
        self.me: dict[str, Any] = {"step": 0, "doing": "start", "batch": "", "progress": 0, "host": _host(), "pid": os.getpid()}
        self._pulse = 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its pulse, and when it last changed
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ConfigError(
                "run_dir", f"{folder.parent.parent} cannot be written: {problem}; choose another run_dir"
            ) from problem
        self.write()

    def write(self) -> None:
        self._pulse += 1
        with contextlib.suppress(OSError), replacing(self.file(self.rank), flushed=False) as temporary:
            temporary.write_text(json.dumps({**self.me, "pulse": self._pulse}), encoding="utf-8")

    def read(self, rank: int) -> dict[str, Any] | None:
        """What a rank wrote last; None if there is no such file."""
        try:
            return json.loads(self.file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def file(self, rank: int, kind: str = "json") -> Path:
        return self.folder / f"rank-{rank:04d}.{kind}"

    def note(self, kind: str, text: str) -> None:
        """Leave a text for the other ranks: an `error`, or the function that `hangs`."""
        self.file(self.rank, kind).write_text(text, encoding="utf-8", errors="replace")

    def notes(self, kind: str) -> dict[int, str]:
        """{rank: text} of the ranks that left one."""
        found = {}
        for rank in range(self.size):
            with contextlib.suppress(OSError):
                found[rank] = self.file(rank, kind).read_text(encoding="utf-8")
        return found

    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def silent_for(self, rank: int) -> float:
        """Seconds since the pulse of a rank last changed, by this process's clock; 0.0 if it has written nothing."""
        about, now = self.read(rank), time.monotonic()
        if about is None:
            return 0.0
        if self._seen.get(rank, (None, 0.0))[0] != about["pulse"]:
            self._seen[rank] = (about["pulse"], now)
        return now - self._seen[rank][1]

    def state(self, rank: int) -> str | None:
        """Why the process of a rank on this machine does not run; None if it runs, or is on another machine."""
        about = self.read(rank)
        if about is None or about["host"] != self.me["host"]:
            return None
        try:
            state = Path(f"/proc/{about['pid']}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            state = "X" if Path("/proc/self").exists() else ""
        return STATES.get(state)

    def close(self) -> None:
        """Remove this rank's file; the last running rank removes the folder."""
        with contextlib.suppress(OSError):
            self.file(self.rank).unlink(missing_ok=True)
            if not any(self.state(rank) is None for rank in self.others() if self.file(rank).exists()):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.parent.rmdir()


def _host() -> str:
    """The machine, and the namespace of its process ids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def describe(about: dict[str, Any] | None) -> str:
    """`after step 7 (waiting for its batch), last batch 3f2a..., pid 12 on node3`"""
    if not about:
        return "nowhere"
    batch = f", last batch {about['batch'][:16]}" if about["batch"] else ""
    return f"after step {about['step']} ({about['doing']}){batch}, pid {about['pid']} on {about['host'].split()[0]}"

"""The heartbeat files of a run: each rank writes its step and process, and reads those of the others. Imports no torch."""

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

from olmo_train.errors import ConfigError, PeerError, reason
from olmo_train.storage import replacing

STATES = {"T": "its process is stopped", "Z": "its process is dead", "X": "its process is gone"}  # of /proc/PID/stat
HANG, LOST = "hang", "lost"  # files that mark that the run hangs, or that a rank failed or died
DEAD = (STATES["Z"], STATES["X"])


def new_heartbeats(run_dir: Path) -> Path:
    """A new folder for the heartbeats of this start of a run; removes those of earlier starts."""
    heartbeats = run_dir / ".heartbeats"
    shutil.rmtree(heartbeats, ignore_errors=True)
    return heartbeats / uuid.uuid4().hex[:8]


class Heartbeats:
    """The heartbeats of all ranks in one folder. Only the watchdog's process and `close` write."""

    def __init__(self, folder: Path, rank: int, size: int, pid: int):
        """`pid`: the process of this rank. Raises ConfigError if the folder cannot be written."""
        self.folder, self.rank, self.size = folder, rank, size
        self.me: dict[str, Any] = {"step": 0, "doing": "start", "batch": "", "progress": 0, "host": _host(), "pid": pid}
        self._pulse = 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its pulse, and when it last changed
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ConfigError(
                "run_dir", f"{folder.parent.parent} cannot be written: {reason(problem)}; choose another run_dir"
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
        """Leave a text for the other ranks: an `error`, the function that `hangs`, or nothing when the loop has `ended`."""
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
        return state_of(about["pid"])

    def lost(self, silence: float) -> dict[int, str]:
        """{rank: why} of the other ranks that failed, died, or have been silent for `silence` seconds."""
        found = {rank: "ended its loop over train()" for rank in self.notes("ended") if rank != self.rank}
        found |= {rank: f"failed: {text}" for rank, text in self.notes("error").items() if rank != self.rank}
        for rank in set(self.others()) - set(found):
            where = describe(self.read(rank))
            if self.state(rank) in DEAD:
                found[rank] = f"was killed, or died without a word, {where}"
            elif self.silent_for(rank) > silence:
                found[rank] = f"is silent, {where}"
        return found

    def lost_error(self, lost: dict[int, str]) -> PeerError:
        """The error that names the lost ranks. It speaks on the first of the other ranks, unless rank 0 failed with an error that
        it prints itself, or a hang was reported."""
        reasons = "; ".join(f"rank {rank} {why}" for rank, why in sorted(lost.items())) or "another process of the run is gone"
        error = PeerError("peers", f"{reasons}; run the same command again")
        first = min(set(range(self.size)) - set(lost))
        is_reported = self.file(0, "error").exists() or (self.folder / HANG).exists()
        error.speaks = self.rank == first and not is_reported
        return error

    def close(self) -> None:
        """Remove this rank's file; the last running rank removes the folder."""
        with contextlib.suppress(OSError):
            self.file(self.rank).unlink(missing_ok=True)
            if not any(self.state(rank) is None for rank in self.others() if self.file(rank).exists()):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.parent.rmdir()


def state_of(pid: int) -> str | None:
    """Why a process of this machine does not run; None if it does."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        state = "X" if Path("/proc/self").exists() else ""
    return STATES.get(state)


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

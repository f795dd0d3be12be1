"""End a run that hangs or has lost a rank, and report which rank is to blame and why.

Each rank has a second process, guards/watcher.py, which writes a heartbeat file: the current step, and that the rank's process
runs. A rank that makes no progress reads the files of the others. A file that is no longer written belongs to a stopped or dead
process; a file with a lower step belongs to a rank that the others wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo_train.errors import PeerError, UserError
from olmo_train.guards import watcher
from olmo_train.guards.heartbeats import HANG, LOST, Heartbeats

log = logging.getLogger(__name__)
PATIENCE = 1800  # least seconds without progress allowed while loading, compiling or saving
NEVER = 365 * 86400.0  # seconds
SEARCH = 15.0  # seconds to look for the reason of a lost connection


def group_timeout(hang_seconds: float) -> float:
    """Seconds after which a collective fails: later than the watchdog, which can report the rank and the reason.

    If the watchdog is off (0), collectives do not time out either.
    """
    return max(hang_seconds, PATIENCE) + 120 if hang_seconds else NEVER


class Watchdog:
    """Ends the process with exit code 6 when this rank or another does not call `heartbeat` for `seconds`, or another is lost."""

    def __init__(self, seconds: float, run_dir: Path, folder: Path, rank: int, size: int = 1):
        """`folder` holds the heartbeats of this start of the run only. seconds = 0: a hang does not end the process.

        Raises ConfigError if the folder cannot be written.
        """
        self.seconds, self.rank, self.size, self.run_dir = seconds, rank, size, run_dir
        self.beats = Heartbeats(folder, rank, size, os.getpid())
        self._patience = max(seconds, PATIENCE)
        self._failed = self._is_busy = self._is_reported = False
        self._shared: int | None = None  # a file in memory that the watcher reads
        self._watcher: subprocess.Popen[bytes] | None = None
        self._ending = contextlib.ExitStack()
        if seconds or size > 1:
            self._start()

    def heartbeat(self, step: int, doing: str = "between steps", batch: str = "") -> None:
        """Report progress, and what training does now. Called equally often on all ranks. `batch`: its sample_hash."""
        me = self.beats.me
        self.beats.me = me | {"step": step, "doing": doing, "progress": me["progress"] + 1, "batch": batch or me["batch"]}
        if doing == "between steps":  # the first step, which compiles, has ended
            self._patience = self.seconds
        self._share()

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Allow more time for work without heartbeats, such as a save."""
        before, self._patience, self._is_busy = self._patience, max(self.seconds, PATIENCE), True
        self.heartbeat(self.beats.me["step"], doing)
        try:
            yield
        finally:
            self._patience, self._is_busy = before, False
            self._share()

    @contextlib.contextmanager
    def exit_report(self) -> Iterator[None]:
        """If this rank fails, write the reason to a file; if a peer is lost, add the peer's reason to the PeerError. The inner
        of two reports once, before anything is closed."""
        try:
            yield
        except Exception as problem:
            if not self._is_reported:
                self._is_reported = True
                self._leave(problem)
                if isinstance(problem, PeerError):
                    raise self._explain(problem) from problem
            raise
        else:
            with contextlib.suppress(OSError):
                self.beats.note("ended", "")

    def _leave(self, problem: Exception) -> None:
        """Note why this rank leaves, and allow time to close logs and to finish a save. The watcher no longer ends this rank for
        a lost one."""
        why = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
        if not isinstance(problem, PeerError):
            with contextlib.suppress(OSError):
                self.beats.note("error", " ".join(why.split()))
        self._failed = not isinstance(problem, PeerError)
        self._is_busy, self._patience = True, max(self.seconds, PATIENCE)
        self._share()

    def _explain(self, problem: PeerError) -> PeerError:
        """The PeerError with the lost rank and its reason, if they are found within SEARCH seconds. If the run hangs, the other
        rank was ended for it: then this rank's watcher reports the hang and ends this process too."""
        if self._watcher is not None and (self.beats.folder / HANG).exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watcher.wait(2 * watcher.GRACE)
        deadline = time.monotonic() + SEARCH
        lost: dict[int, str] = {}
        while self.size > 1 and not lost and time.monotonic() < deadline:
            lost = self.beats.lost(2.5 * watcher.interval(self.seconds))
            time.sleep(0.05)
        return self.beats.lost_error(lost) if lost else problem

    def close(self) -> None:
        """Stop watching, and remove this rank's heartbeats. After an error, the other ranks may no longer wait for this one."""
        if self._failed:
            with contextlib.suppress(OSError):
                (self.beats.folder / LOST).touch()
        self._ending.close()
        self.beats.close()

    # ---- the watcher

    def _start(self) -> None:
        """Start the watcher, and let it write this process's stacks and end it by signals that C code handles: Python runs its
        own handlers only while no other code holds its lock."""
        shared, stacks = _open_memory(), _open_memory()
        self._shared = shared
        self._share()
        faulthandler.register(watcher.STACKS, file=stacks, all_threads=True)
        assert int(watcher.END) == PeerError.exit_code  # the handler _exit takes the signal's number as the exit code
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        before = libc.signal(watcher.END, ctypes.cast(libc._exit, ctypes.c_void_p))
        about: dict[str, Any] = {"shared": shared, "stacks": stacks, "seconds": self.seconds, "run_dir": str(self.run_dir)}
        about |= {"folder": str(self.beats.folder), "rank": self.rank, "size": self.size}
        about |= {"thread": threading.main_thread().ident}
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", watcher.__name__, json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(shared, stacks),
            start_new_session=True,  # Ctrl-C is not for the watcher
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

        def end(process: subprocess.Popen[bytes] = self._watcher) -> None:
            process.kill()  # it must not write again
            process.communicate()
            self._shared = self._watcher = None
            libc.signal(watcher.END, before)
            faulthandler.unregister(watcher.STACKS)
            os.close(shared)
            os.close(stacks)

        self._ending.callback(end)

    def _share(self) -> None:
        """Let the watcher see the state of this rank."""
        if self._watcher is not None and self._watcher.poll() is not None:
            log.warning("the watchdog's process has ended (exit code %d); starting it again", self._watcher.returncode)
            self._ending.close()
            self._start()
        if self._shared is not None:
            about = {"me": self.beats.me, "last": time.monotonic(), "patience": self._patience, "is_busy": self._is_busy}
            os.pwrite(self._shared, json.dumps(about).encode().ljust(watcher.RECORD_BYTES), 0)


def _open_memory() -> int:
    """A file in memory; on a system that has none (macOS) a temporary one without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("watchdog")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

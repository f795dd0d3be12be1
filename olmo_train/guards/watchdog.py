"""End a run that hangs, and report which rank is to blame and why.

A thread on each rank writes a small heartbeat file: the current step, and that the process is alive. A rank that makes no
progress reads the files of the others. A file that is no longer written belongs to a stopped or dead process; a file with a
lower step belongs to a rank that the others wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo_train.errors import ConfigError, PeerError, UserError

PATIENCE = 1800  # least seconds without progress allowed while loading, compiling or saving
NEVER = 365 * 86400.0  # seconds
GRACE = 5.0  # seconds for all ranks to write their stacks before the first one ends
SEARCH = 15.0  # seconds to look for the reason of a lost connection
STATES = {"T": "its process is stopped", "Z": "its process is dead", "X": "its process is gone"}  # of /proc/PID/stat


def group_timeout(hang_seconds: float) -> float:
    """Seconds after which a collective fails: later than the watchdog, which can report the rank and the reason.

    If the watchdog is off (0), collectives do not time out either.
    """
    return max(hang_seconds, PATIENCE) + 120 if hang_seconds else NEVER


def new_heartbeats(run_dir: Path) -> Path:
    """A new folder for the heartbeats of this start of a run; removes those of earlier starts."""
    heartbeats = run_dir / ".heartbeats"
    shutil.rmtree(heartbeats, ignore_errors=True)
    return heartbeats / uuid.uuid4().hex[:8]


class Watchdog:
    """Ends the process with exit code 6 when `heartbeat` was not called for `seconds`, or another rank did the same."""

    def __init__(self, seconds: float, run_dir: Path, folder: Path, rank: int, size: int = 1):
        """`folder` holds the heartbeats of this start of the run only. seconds = 0: never ends the process.

        Raises ConfigError if the folder cannot be written.
        """
        self.seconds, self.rank, self.size, self.folder = seconds, rank, size, folder
        self.stacks = run_dir / "forensics" / "hang"
        self._last, self._patience = time.monotonic(), max(seconds, PATIENCE)
        self._me: dict[str, Any] = {"step": 0, "doing": "start", "batch": "", "progress": 0, "host": _host(), "pid": os.getpid()}
        self._pulse, self._closed = 0, threading.Event()
        self._interval = min(max(seconds / 8, 0.05), 5.0)
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its pulse, and when it last changed
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ConfigError("run_dir", f"{run_dir} cannot be written: {problem}") from problem
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    def heartbeat(self, step: int, doing: str = "between steps", batch: str = "") -> None:
        """Report progress, and what training does now. Called equally often on all ranks. `batch`: its sample_hash."""
        self._last = time.monotonic()
        about = {"step": step, "doing": doing, "progress": self._me["progress"] + 1}
        self._me = {**self._me, **about, **({"batch": batch} if batch else {})}
        if doing == "between steps":  # the first step, which compiles, has ended
            self._patience = self.seconds

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Allow more time for work without heartbeats, such as a save."""
        before, self._patience = self._patience, max(self.seconds, PATIENCE)
        self.heartbeat(self._me["step"], doing)
        try:
            yield
        finally:
            self._last, self._patience = time.monotonic(), before

    @contextlib.contextmanager
    def exit_report(self) -> Iterator[None]:
        """If this rank fails, write the reason to a file; if a peer is lost, add the peer's reason to the PeerError."""
        try:
            yield
        except PeerError as problem:
            raise self._explain(problem) from problem
        except Exception as problem:
            if self.size > 1:
                line = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
                with contextlib.suppress(OSError):
                    self._file(self.rank, "error").write_text(" ".join(line.split()), encoding="utf-8", errors="replace")
            raise

    def close(self) -> None:
        """Remove this rank's heartbeat file; the last running rank removes the folder."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)  # it must not write again
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink(missing_ok=True)
            if not any(self._state(rank) is None for rank in self._others() if self._file(rank).exists()):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.parent.rmdir()

    # ---- in the thread

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - before > self._interval + self.seconds / 2:  # this process itself was stopped: count from now on
                self._last = now
            before = now
            self._write()
            if (self.folder / "hang").exists() or now - self._last > self._patience or self._neighbour_is_lost():
                self._end_run(now - self._last)

    def _write(self) -> None:
        self._pulse += 1
        with contextlib.suppress(OSError):
            temporary = self._file(self.rank, "tmp")
            temporary.write_text(json.dumps({**self._me, "pulse": self._pulse}), encoding="utf-8")
            os.replace(temporary, self._file(self.rank))

    def _neighbour_is_lost(self) -> bool:
        """Whether the next rank's process has stopped running. Each rank checks one other, also when no rank waits for it."""
        neighbour = (self.rank + 1) % self.size
        about = self._read(neighbour)
        if neighbour == self.rank or about is None:
            return False
        return self._silent_for(neighbour, about) > self.seconds

    def _end_run(self, silent_seconds: float) -> None:
        try:
            with contextlib.suppress(OSError):  # a full disk must not keep the run from ending
                (self.folder / "hang").touch()
                self._write_stacks(silent_seconds)
                self._file(self.rank, "hangs").write_text(_current_function(), encoding="utf-8")
            self._wait_for_the_others()
            self._report(silent_seconds)
        finally:
            os._exit(PeerError.exit_code)

    def _write_stacks(self, silent_seconds: float) -> None:
        self.stacks.mkdir(parents=True, exist_ok=True)
        with open(self._stack_file(self.rank), "w", encoding="utf-8") as file:
            file.write(f"rank {self.rank}: no progress for {silent_seconds:.1f} s; {_describe(self._me)}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _report(self, silent_seconds: float) -> None:
        """Print the error, on the lowest running rank only, and write a note in place of the stacks of silent ranks."""
        blamed = self._blamed()
        silent = {rank for rank, (_, is_silent) in blamed.items() if is_silent}
        for rank in silent:  # they cannot write their stacks
            with contextlib.suppress(OSError):
                self._stack_file(rank).write_text(
                    f"rank {rank}: {blamed[rank][0]}; {_describe(self._read(rank) or {})}\n", encoding="utf-8"
                )
        if self.rank == min(set(range(self.size)) - silent):
            who = "; ".join(f"rank {rank}: {why}" for rank, (why, _) in blamed.items()) or "no rank is behind the others"
            problem = PeerError(
                "guards.hang_seconds",
                f"no progress for {max(silent_seconds, self.seconds):g} s after step {self._me['step']}; {who}; "
                f"stacks and last batches of all ranks are in {self.stacks}; run the same command again",
            )
            print(f"error: {problem}", file=sys.stderr, flush=True)

    def _wait_for_the_others(self) -> None:
        """Wait until the other running ranks have written their stacks, and every pulse has had time to change."""
        self._update_pulses()
        started, least = time.monotonic(), min(2.5 * self._interval, GRACE)
        while (waited := time.monotonic() - started) < GRACE:
            self._write()
            missing = [rank for rank in self._others() if self._state(rank) is None and not self._file(rank, "hangs").exists()]
            if waited > least and not missing:
                return
            time.sleep(self._interval / 4)

    def _blamed(self) -> dict[int, tuple[str, bool]]:
        """{rank: (why, whether its process is silent)} of the ranks that the others wait for."""
        about = {rank: self._me if rank == self.rank else self._read(rank) for rank in range(self.size)}
        work = {}  # current function of each rank that noticed the hang; some may have ended since
        for rank in range(self.size):
            with contextlib.suppress(OSError):
                work[rank] = self._file(rank, "hangs").read_text(encoding="utf-8")
        blamed = {}
        for rank in set(range(self.size)) - set(work):
            known = about[rank]
            state = self._state(rank)
            if known is not None and (state or self._silent_for(rank, known) > 2 * self._interval):
                blamed[rank] = (f"{state or 'its process is silent'}, last seen {_describe(known)}", True)
        if not blamed:
            progress = {rank: known["progress"] for rank, known in about.items() if known is not None}
            behind = [rank for rank, count in progress.items() if count < max(progress.values())]
            behind = behind or [rank for rank in work if work[rank] and about[rank]]
            blamed = {rank: (f"keeps the others waiting{work.get(rank, '')}, {_describe(about[rank])}", False) for rank in behind}
        return blamed if self.size > 1 else {0: (f"hangs, {_describe(self._me)}", False)}

    # ---- the state of other ranks

    def _explain(self, problem: PeerError) -> PeerError:
        """The PeerError with the lost rank and its reason, if they are found within SEARCH seconds."""
        deadline = time.monotonic() + SEARCH
        lost: dict[int, str] = {}
        while self.size > 1 and not lost and time.monotonic() < deadline:
            for rank in self._others():
                about = self._read(rank)
                with contextlib.suppress(OSError):
                    lost[rank] = f"failed: {self._file(rank, 'error').read_text(encoding='utf-8')}"
                if rank in lost or about is None:
                    continue
                if self._state(rank) in (STATES["Z"], STATES["X"]):
                    lost[rank] = f"was killed, or died without a word, {_describe(about)}"
                elif self.seconds and self._silent_for(rank, about) > 2.5 * self._interval:
                    lost[rank] = f"is silent, {_describe(about)}"
            time.sleep(0.05)
        if not lost:
            return problem
        reasons = "; ".join(f"rank {rank} {why}" for rank, why in lost.items())
        explained = PeerError("peers", f"{reasons}; run the same command again")
        explained.speaks = self.rank == min(set(range(self.size)) - set(lost))
        return explained

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _update_pulses(self) -> None:
        for rank in self._others():
            if (about := self._read(rank)) is not None:
                self._silent_for(rank, about)

    def _silent_for(self, rank: int, about: dict[str, Any]) -> float:
        """Seconds since the pulse of a rank last changed, by this process's clock."""
        now = time.monotonic()
        if self._seen.get(rank, (None, 0.0))[0] != about["pulse"]:
            self._seen[rank] = (about["pulse"], now)
        return now - self._seen[rank][1]

    def _state(self, rank: int) -> str | None:
        """Why the process of a rank on this machine does not run; None if it runs, or is on another machine."""
        about = self._read(rank)
        if about is None or about["host"] != self._me["host"]:
            return None
        try:
            state = Path(f"/proc/{about['pid']}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            state = "X" if Path("/proc/self").exists() else ""
        return STATES.get(state)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _file(self, rank: int, kind: str = "json") -> Path:
        return self.folder / f"rank-{rank:04d}.{kind}"

    def _stack_file(self, rank: int) -> Path:
        return self.stacks / f"rank-{rank:04d}.txt"


def _host() -> str:
    """The machine, and the namespace of its process ids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _current_function() -> str:
    """` in FUNCTION (FILE:LINE)` of the main thread; empty if it waits for other ranks."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident)
    if innermost is None:
        return ""
    for _ in range(8):
        if frame is None:
            break
        if "/torch/distributed/" in frame.f_code.co_filename:
            return ""
        frame = frame.f_back
    code = innermost.f_code
    return f" in {code.co_name} ({code.co_filename}:{innermost.f_lineno})"


def _describe(about: dict[str, Any]) -> str:
    """`after step 7 (waiting for its batch), last batch 3f2a..., pid 12 on node3`"""
    if not about:
        return "nowhere"
    batch = f", last batch {about['batch'][:16]}" if about["batch"] else ""
    return f"after step {about['step']} ({about['doing']}){batch}, pid {about['pid']} on {about['host'].split()[0]}"

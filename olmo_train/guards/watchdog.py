"""End a run that hangs, and report which rank is to blame and why.

A thread on each rank writes a heartbeat file: the current step, and that the process is alive. A rank that makes no progress
reads the files of the others. A file that is no longer written belongs to a stopped or dead process; a file with a lower step
belongs to a rank that the others wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from olmo_train.errors import PeerError, UserError
from olmo_train.guards.heartbeats import STATES, Heartbeats, describe

PATIENCE = 1800  # least seconds without progress allowed while loading, compiling or saving
NEVER = 365 * 86400.0  # seconds
GRACE = 5.0  # seconds for all ranks to write their stacks before the first one ends
SEARCH = 15.0  # seconds to look for the reason of a lost connection


def group_timeout(hang_seconds: float) -> float:
    """Seconds after which a collective fails: later than the watchdog, which can report the rank and the reason.

    If the watchdog is off (0), collectives do not time out either.
    """
    return max(hang_seconds, PATIENCE) + 120 if hang_seconds else NEVER


class Watchdog:
    """Ends the process with exit code 6 when `heartbeat` was not called for `seconds`, or another rank did the same."""

    def __init__(self, seconds: float, run_dir: Path, folder: Path, rank: int, size: int = 1):
        """`folder` holds the heartbeats of this start of the run only. seconds = 0: never ends the process.

        Raises ConfigError if the folder cannot be written.
        """
        self.seconds, self.rank, self.size = seconds, rank, size
        self.beats = Heartbeats(folder, rank, size)
        self.stacks = run_dir / "forensics" / "hang"
        self._last, self._patience = time.monotonic(), max(seconds, PATIENCE)
        self._closed = threading.Event()
        self._interval = min(max(seconds / 8, 0.05), 5.0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    def heartbeat(self, step: int, doing: str = "between steps", batch: str = "") -> None:
        """Report progress, and what training does now. Called equally often on all ranks. `batch`: its sample_hash."""
        self._last, me = time.monotonic(), self.beats.me
        self.beats.me = me | {"step": step, "doing": doing, "progress": me["progress"] + 1, "batch": batch or me["batch"]}
        if doing == "between steps":  # the first step, which compiles, has ended
            self._patience = self.seconds

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Allow more time for work without heartbeats, such as a save."""
        before, self._patience = self._patience, max(self.seconds, PATIENCE)
        self.heartbeat(self.beats.me["step"], doing)
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
            line = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
            with contextlib.suppress(OSError):
                self.beats.note("error", " ".join(line.split()))
            raise

    def _explain(self, problem: PeerError) -> PeerError:
        """The PeerError with the lost rank and its reason, if they are found within SEARCH seconds."""
        deadline = time.monotonic() + SEARCH
        lost: dict[int, str] = {}
        while self.size > 1 and not lost and time.monotonic() < deadline:
            lost = {rank: f"failed: {text}" for rank, text in self.beats.notes("error").items() if rank != self.rank}
            for rank in set(self.beats.others()) - set(lost):
                where = describe(self.beats.read(rank))
                if self.beats.state(rank) in (STATES["Z"], STATES["X"]):
                    lost[rank] = f"was killed, or died without a word, {where}"
                elif self.seconds and self.beats.silent_for(rank) > 2.5 * self._interval:
                    lost[rank] = f"is silent, {where}"
            time.sleep(0.05)
        if not lost:
            return problem
        reasons = "; ".join(f"rank {rank} {why}" for rank, why in sorted(lost.items()))
        explained = PeerError("peers", f"{reasons}; run the same command again")
        explained.speaks = self.rank == min(set(range(self.size)) - set(lost))
        return explained

    def close(self) -> None:
        """Stop watching, and remove this rank's heartbeats."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)  # it must not write again
        self.beats.close()

    # ---- in the thread

    def _watch(self) -> None:
        before = time.monotonic()
        neighbour = (self.rank + 1) % self.size  # each rank checks one other, also when no rank waits for it
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - before > self._interval + self.seconds / 2:  # this process itself was stopped: count from now on
                self._last = now
            before = now
            self.beats.write()
            neighbour_is_lost = neighbour != self.rank and self.beats.silent_for(neighbour) > self.seconds
            if (self.beats.folder / "hang").exists() or now - self._last > self._patience or neighbour_is_lost:
                self._end_run(now - self._last)

    def _end_run(self, silent_seconds: float) -> None:
        try:
            with contextlib.suppress(OSError):  # a full disk must not keep the run from ending
                (self.beats.folder / "hang").touch()
                self._write_stacks(silent_seconds)
                self.beats.note("hangs", _current_function())
            self._wait_for_the_others()
            self._report(silent_seconds)
        finally:
            os._exit(PeerError.exit_code)

    def _write_stacks(self, silent_seconds: float) -> None:
        self.stacks.mkdir(parents=True, exist_ok=True)
        with open(self._stack_file(self.rank), "w", encoding="utf-8") as file:
            file.write(f"rank {self.rank}: no progress for {silent_seconds:.1f} s; {describe(self.beats.me)}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _wait_for_the_others(self) -> None:
        """Wait until the other running ranks have written their stacks, and every pulse has had time to change."""
        started, least = time.monotonic(), min(2.5 * self._interval, GRACE)
        for rank in self.beats.others():
            self.beats.silent_for(rank)  # note its pulse
        while (waited := time.monotonic() - started) < GRACE:
            self.beats.write()
            running = {rank for rank in self.beats.others() if self.beats.state(rank) is None}
            if waited > least and running <= self.beats.notes("hangs").keys():
                return
            time.sleep(self._interval / 4)

    def _report(self, silent_seconds: float) -> None:
        """Print the error, on the lowest running rank only, and write a note in place of the stacks of silent ranks."""
        silent = self._silent()
        for rank, why in silent.items():
            with contextlib.suppress(OSError):
                self._stack_file(rank).write_text(f"rank {rank}: {why}; {describe(self.beats.read(rank))}\n", encoding="utf-8")
        blamed = {rank: f"{why}, last seen {describe(self.beats.read(rank))}" for rank, why in silent.items()} or self._behind()
        if self.rank == min(set(range(self.size)) - set(silent)):
            who = "; ".join(f"rank {rank}: {why}" for rank, why in blamed.items()) or "no rank is behind the others"
            problem = PeerError(
                "guards.hang_seconds",
                f"no progress for {max(silent_seconds, self.seconds):g} s after step {self.beats.me['step']}; {who}; "
                f"stacks and last batches of all ranks are in {self.stacks}; run the same command again",
            )
            print(f"error: {problem}", file=sys.stderr, flush=True)

    def _silent(self) -> dict[int, str]:
        """{rank: why} of the ranks whose process no longer runs and has not noticed the hang itself."""
        silent = {}
        for rank in set(self.beats.others()) - self.beats.notes("hangs").keys():
            state = self.beats.state(rank)
            if state or self.beats.silent_for(rank) > 2 * self._interval:
                silent[rank] = state or "its process is silent"
        return silent

    def _behind(self) -> dict[int, str]:
        """{rank: why} of the running ranks that the others wait for."""
        if self.size == 1:
            return {0: f"hangs, {describe(self.beats.me)}"}
        found = {rank: self.beats.me if rank == self.rank else self.beats.read(rank) for rank in range(self.size)}
        about = {rank: known for rank, known in found.items() if known}
        work = self.beats.notes("hangs")  # current function of each rank that noticed the hang; some may have ended since
        most = max(known["progress"] for known in about.values())
        behind = [rank for rank, known in about.items() if known["progress"] < most]
        behind = behind or [rank for rank in about if work.get(rank)]
        return {rank: f"keeps the others waiting{work.get(rank, '')}, {describe(about[rank])}" for rank in behind}

    def _stack_file(self, rank: int) -> Path:
        return self.stacks / f"rank-{rank:04d}.txt"


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

"""The process that watches one rank, started by guards/watchdog.py. Imports no torch.

It is a process because training can block with Python's lock held, as in the launch of a GPU kernel while the queue is full: then
no thread of Python runs. This process still writes the rank's heartbeats, so that other ranks do not blame it, and still reports
a hang and ends the rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from olmo_train.errors import PeerError
from olmo_train.guards.heartbeats import DEAD, HANG, LOST, Heartbeats, describe, state_of
from olmo_train.parallel.processes import STOP_SIGNALS

# Makes the rank write its stacks, at any moment. macOS has no SIGRTMIN.
STACKS = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
END = signal.SIGABRT  # makes the rank exit with its own number, that of a PeerError
GRACE = 10.0  # most seconds for all ranks to write their stacks before the first one ends
NOTICE = 4.0  # seconds for a rank to notice by itself that another is lost
TICK = 1.0  # most seconds between two looks at the rank and at the marks of the others
RECORD_BYTES = 1024  # of what the rank shares about itself


def interval(seconds: float) -> float:
    """Seconds between two heartbeats of a rank, for guards.hang_seconds; 0: a hang is not looked for."""
    return min(max(seconds / 8, 0.05), 5.0) if seconds else 5.0


def read_record(descriptor: int) -> dict[str, Any]:
    """What the rank last wrote about itself; read twice, as it may be writing now."""
    text = None
    while text != (text := os.pread(descriptor, RECORD_BYTES, 0)):
        pass
    return json.loads(text)


class Watcher:
    """Ends the process of a rank with exit code 6 when it or another rank makes no progress for `seconds`, or another is lost."""

    def __init__(self, shared: int, stacks: int, seconds: float, run_dir: str, folder: str, rank: int, size: int, thread: int):
        """`shared` and `stacks`: files in memory, of the rank's record and its stacks. `thread`: the id of its main thread."""
        self.shared, self.stacks, self.seconds, self.rank, self.size, self.thread = shared, stacks, seconds, rank, size, thread
        self.folder = Path(run_dir) / "forensics" / "hang"
        self.record = read_record(shared)
        self.pid = self.record["me"]["pid"]
        self.beats = Heartbeats(Path(folder), rank, size, self.pid)
        self.interval = interval(seconds)
        self.neighbour = (rank + 1) % size
        self.lost_since: float | None = None

    def watch(self) -> None:
        """Until the rank closes the pipe of stdin, which it also does by ending."""
        tick, before = min(self.interval, TICK), time.monotonic()
        written = resumed = 0.0
        while not select.select([0], [], [], tick)[0] and os.getppid() == self.pid:
            now = time.monotonic()
            stopped = state_of(self.pid) is not None
            if stopped or now - before > tick + self.seconds / 2:  # it was stopped, or this machine was: count from now on
                resumed = now
            before = now
            if stopped:
                continue
            self.record = read_record(self.shared)
            self.beats.me = self.record["me"]
            if now - written >= self.interval:
                self.beats.write()
                written = now
            silent = now - max(self.record["last"], resumed)
            if self.seconds and self.hangs(silent):
                self.end(lambda silent=silent: self.report_hang(silent))
            if self.size > 1 and self.has_lost_one(now) and not self.record["is_busy"]:
                self.end(self.report_lost)

    def hangs(self, silent_seconds: float) -> bool:
        """Whether this rank or another makes no progress. Each checks one other, also when no rank waits for that one."""
        neighbour_is_silent = self.size > 1 and self.beats.silent_for(self.neighbour) > self.seconds
        return silent_seconds > self.record["patience"] or neighbour_is_silent or (self.beats.folder / HANG).exists()

    def end(self, report: Callable[[], None]) -> None:
        """Report, then end the rank, also if the report fails."""
        try:
            report()
        finally:
            os.kill(self.pid, END)
            sys.exit()

    def has_lost_one(self, now: float) -> bool:
        """Whether another rank failed or died more than NOTICE seconds ago: this one has not noticed, as it waits in NCCL."""
        mark = self.beats.folder / LOST
        if not mark.exists():
            if self.beats.state(self.neighbour) in DEAD:
                with contextlib.suppress(OSError):
                    mark.touch()
            return False
        self.lost_since = self.lost_since or now
        return now - self.lost_since > NOTICE

    def report_lost(self) -> None:
        error = self.beats.lost_error(self.beats.lost(3 * self.interval))
        if error.speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)

    def report_hang(self, silent_seconds: float) -> None:
        """The stacks of all ranks and who keeps the others waiting; of a rank that failed and is still leaving, its error."""
        if self.beats.notes("error").keys() - {self.rank}:
            self.report_lost()
            return
        with contextlib.suppress(OSError):  # a full disk must not keep the run from ending
            (self.beats.folder / HANG).touch()
            stacks = self.dump()
            self.folder.mkdir(parents=True, exist_ok=True)
            text = f"rank {self.rank}: no progress for {silent_seconds:.1f} s; {describe(self.beats.me)}\n{stacks}"
            self.stack_file(self.rank).write_text(text, encoding="utf-8")
            self.beats.note("hangs", current_function(stacks, self.thread))
        self.wait_for_the_others()
        self.print_hang(silent_seconds)

    def dump(self) -> str:
        """The stacks of the rank's threads, which its signal handler writes in C."""
        os.kill(self.pid, STACKS)
        deadline, size = time.monotonic() + 2, -1
        while size != (size := os.fstat(self.stacks).st_size) or not size:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return os.pread(self.stacks, max(size, 0), 0).decode(errors="replace")

    def wait_for_the_others(self) -> None:
        """Wait until the other running ranks have written their stacks, and every pulse has had time to change."""
        started, least = time.monotonic(), min(2.5 * self.interval, GRACE)
        for rank in self.beats.others():
            self.beats.silent_for(rank)  # note its pulse
        while (waited := time.monotonic() - started) < GRACE:
            self.beats.write()
            running = {rank for rank in self.beats.others() if self.beats.state(rank) is None}
            if waited > least and running <= self.beats.notes("hangs").keys():
                return
            time.sleep(min(self.interval, TICK) / 4)

    def print_hang(self, silent_seconds: float) -> None:
        """Print the error, on the lowest running rank only, and write a note in place of the stacks of silent ranks."""
        silent = self.silent()
        for rank, why in silent.items():
            with contextlib.suppress(OSError):
                self.stack_file(rank).write_text(f"rank {rank}: {why}; {describe(self.beats.read(rank))}\n", encoding="utf-8")
        blamed = {rank: f"{why}, last seen {describe(self.beats.read(rank))}" for rank, why in silent.items()} or self.behind()
        if self.rank == min(set(range(self.size)) - set(silent)):
            who = "; ".join(f"rank {rank}: {why}" for rank, why in blamed.items()) or "no rank is behind the others"
            error = PeerError(
                "guards.hang_seconds",
                f"no progress for {max(silent_seconds, self.seconds):g} s after step {self.beats.me['step']}; {who}; "
                f"stacks and last batches of all ranks are in {self.folder}; run the same command again",
            )
            print(f"error: {error}", file=sys.stderr, flush=True)

    def silent(self) -> dict[int, str]:
        """{rank: why} of the ranks whose process no longer runs and has not noticed the hang itself."""
        silent = {}
        for rank in set(self.beats.others()) - self.beats.notes("hangs").keys():
            state = self.beats.state(rank)
            if state or self.beats.silent_for(rank) > 2 * self.interval:
                silent[rank] = state or "its process is silent"
        return silent

    def behind(self) -> dict[int, str]:
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

    def stack_file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:04d}.txt"


def current_function(stacks: str, thread: int) -> str:
    """` in FUNCTION (FILE:LINE)` of a thread, from faulthandler's text; empty if the thread waits for other ranks."""
    own = next((block for block in stacks.split("\n\n") if f"0x{thread:016x}" in block.partition("\n")[0]), "")
    frames = re.findall(r'File "(.*)", line (\d+) in (.*)', own)
    if not frames or any("/torch/distributed/" in file for file, _, _ in frames[:8]):
        return ""
    file, line, name = frames[0]
    return f" in {name} ({file}:{line})"


if __name__ == "__main__":
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a launcher may signal all processes; this one ends with its rank
    Watcher(**json.loads(sys.argv[1])).watch()

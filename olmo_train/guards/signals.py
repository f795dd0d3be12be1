"""Stop signals: SIGTERM, SIGINT and SIGUSR1."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from olmo_train.parallel.processes import STOP_SIGNALS, TIMEOUT, killed_after, rank, reads_timeout

log = logging.getLogger(__name__)
ERASE_LINE, SHOW_CURSOR = "\r\x1b[2K", "\x1b[?25h"  # codes of a terminal; a progress bar hides the cursor


def too_slow_to_stop(line: dict[str, Any]) -> str | None:
    """A warning if torchrun would kill the processes before they have saved; None if it would not, or is not known to.

    `line`: metrics with the seconds of a step and of a save, if they are known.
    """
    patience, save_seconds = killed_after(), line.get("throughput/checkpoint_write_seconds")
    if patience is None:
        return None
    kills = f"torchrun kills the run {patience:.0f} s after a signal"
    launch = "start it with `python -m olmo_train.parallel.launch` instead of torchrun"
    if TIMEOUT in os.environ and not reads_timeout():
        from importlib.metadata import version  # slow to import, for a rare warning

        return f"{kills}, because that of torch {version('torch')} does not read {TIMEOUT}={os.environ[TIMEOUT]}; {launch}"
    if save_seconds is None or (needed := line["throughput/step_seconds"] + save_seconds) < patience:
        return None
    also = f", or with {TIMEOUT}={2 * needed:.0f}" * reads_timeout()
    return f"a signal would lose steps: a step and a save take {needed:.0f} s, and {kills}; {launch}{also}"


def counts_again(number: int, seconds: float) -> bool:
    """Whether a signal that comes `seconds` after the first asks to leave at once. One Ctrl-C can arrive twice, and Slurm and
    torchrun repeat SIGTERM and SIGUSR1."""
    return seconds > (2 if number == signal.SIGINT else 10)


class StopSignals:
    """Records a stop signal, SIGTERM, SIGINT or SIGUSR1, and acknowledges it on stderr. A second one ends the process at once.

    A thread reads the signals: Python calls a handler only between two instructions of the main thread, which may compute in
    C++ for minutes, or wait for a process that hangs.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number, 0 for none
        self.step: int | None = None  # the step in progress, or the last one
        self.is_saved = False  # the step after which the run stops is committed
        self._warned = self._acknowledged = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python handles signals in the main thread only: otherwise they are left to the caller
            return
        before = {name: signal.signal(name, self._receive) for name in STOP_SIGNALS}
        try:
            with _reading(self._read):
                yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def warn_if_too_slow(self, line: dict[str, Any]) -> None:
        """Warn once when metrics show that a step and a save take too long for torchrun."""
        if not self._warned and (warning := too_slow_to_stop(line)):
            log.warning(warning)
            self._warned = True

    def agree(self, number: int, step: int) -> None:
        """Note the signal that some rank has received; `step` is the last one that is done."""
        self._receive(number, None)
        self._acknowledge(f"{signal.Signals(number).name} on another rank: saving after step {step}\n")

    def _acknowledge(self, text: str) -> None:
        """Write the text, the first time."""
        with self._lock:
            if not self._acknowledged:
                self._acknowledged = True
                _write(text)

    def _receive(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def _read(self, reading: int) -> None:
        """Answer each signal whose number comes from the pipe, until its other end is closed."""
        first = None
        while byte := os.read(reading, 1):
            number, now = byte[0], time.monotonic()
            if number not in STOP_SIGNALS:
                continue
            if first is None:
                first = now
                self._receive(number, None)
                doing = "still starting; will save and stop" if self.step is None else f"finishing step {self.step}, then saving"
                again = "; Ctrl-C again to leave at once" if number == signal.SIGINT else ""
                self._acknowledge(f"{signal.Signals(number).name}: {doing}{again}\n")
            elif counts_again(number, now - first) and not (self.is_saved and number != signal.SIGINT):
                _write(f"{SHOW_CURSOR if os.isatty(2) else ''}{signal.Signals(number).name} again: leaving without saving\n")
                os._exit(128 + number)  # safe: committed checkpoints are complete at any moment


@contextlib.contextmanager
def _reading(read: Callable[[int], None]) -> Iterator[None]:
    """Run `read` in a thread, with a pipe that has a byte, its number, for each signal to this process."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=read, args=(reading,), daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        os.close(writing)
        thread.join()
        os.close(reading)


@contextlib.contextmanager
def acknowledged_interrupt() -> Iterator[None]:
    """Acknowledge a Ctrl-C that has not ended the block within a second; a later one then ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left = threading.Event()

    def read(reading: int) -> None:
        first = None
        while byte := os.read(reading, 1):
            if byte[0] != signal.SIGINT:
                continue
            if first is None:
                first = time.monotonic()
                if not left.wait(1):
                    _write("SIGINT: stopping; Ctrl-C again to leave at once\n")
            elif counts_again(signal.SIGINT, time.monotonic() - first):
                _write(SHOW_CURSOR if os.isatty(2) else "")
                os._exit(128 + signal.SIGINT)  # safe: files and folders are complete or absent

    with _reading(read):
        try:
            yield
        finally:
            left.set()


def _write(text: str) -> None:
    """Write to stderr, from rank 0, past Python's buffers, and in a terminal over the bar, which is drawn again below."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, ((ERASE_LINE if os.isatty(2) else "") + text).encode())


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a signal to a child is not one to this process

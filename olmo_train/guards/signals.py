"""Stop signals: SIGTERM, SIGINT and SIGUSR1."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


def too_slow_to_stop(step_seconds: float, save_seconds: float) -> str | None:
    """A warning if a step and a save take longer than torchrun waits after a signal before it kills its processes, 30 s by
    default; None if they fit, or without torchrun."""
    patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    needed = step_seconds + save_seconds
    if "TORCHELASTIC_RUN_ID" not in os.environ or needed < patience:
        return None
    return (
        f"a signal to torchrun would lose steps: a step and a save take {needed:.0f} s, and torchrun kills its processes after "
        f"{patience:.0f} s; start it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT={2 * needed:.0f}, or signal the processes themselves"
    )


class StopSignals:
    """Records a stop signal: SIGTERM, SIGINT or SIGUSR1. A second signal ends the process at once."""

    NAMES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0  # the signal's number, 0 for none
        self._warned = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python handles signals in the main thread only: otherwise they are left to the caller
            return
        before = {name: signal.signal(name, self._receive) for name in self.NAMES}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def warn_if_too_slow(self, line: dict[str, Any]) -> None:
        """Warn once when a line of metrics shows that a step and a save take too long for torchrun."""
        save_seconds = line.get("throughput/checkpoint_write_seconds")
        if self._warned or save_seconds is None:
            return
        if warning := too_slow_to_stop(line["throughput/step_seconds"], save_seconds):
            log.warning(warning)
            self._warned = True

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            os._exit(128 + number)  # safe: committed checkpoints are complete at any moment
        self.received = number

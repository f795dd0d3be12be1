"""What a run logs: metrics and events to files, lines to the console. Rank 0 writes; on other ranks every method is a no-op."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olmo_train.log.console import Console
from olmo_train.log.recorder import Recorder
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig


class RunLogger:
    def __init__(self, config: TrainConfig, world: World, last_step: int, resolved: dict[str, Any]):
        """`last_step`: the step that the run goes on from; `resolved`: the configuration as it is saved."""
        run_dir = Path(config.run_dir)
        self._committed_step = last_step or -1  # a fresh run may save its step 0
        self._recorder = world.on_main_only(lambda: Recorder(run_dir, config.log, resolved, last_step))
        self._console = world.on_main_only(lambda: Console(config.run_dir, last_step, config.steps))

    @property
    def _is_silent(self) -> bool:
        return self._recorder is None

    def log(self, step: int, line: dict[str, Any]) -> None:
        """One line of metrics."""
        if not self._is_silent:
            self._recorder.log(step, line)
            self._console.log(step, line)

    def event(self, event: str, step: int, **details: Any) -> None:
        if not self._is_silent:
            self._recorder.event(event, step, **details)

    def say(self, text: str) -> None:
        if not self._is_silent:
            self._console.say(text)

    def count(self, step: int) -> None:
        """Count a finished step on the console."""
        if not self._is_silent:
            self._console.step(step)

    def sync(self) -> None:
        """Flush everything logged so far to the disk, so that it survives a power cut."""
        if not self._is_silent:
            self._recorder.sync()

    def note_commit(self, step: int) -> None:
        """Log once that the checkpoint of a step is committed: no resume repeats steps up to it, so mirrors may upload them."""
        if step > self._committed_step:
            self._committed_step = step
            self.event("save", step)
        if not self._is_silent:
            self._recorder.settle(step)

    def close(self) -> None:
        if not self._is_silent:
            self._console.close()
            self._recorder.close()

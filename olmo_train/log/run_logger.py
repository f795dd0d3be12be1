"""Log a run: metrics and events to files, lines to the console. Rank 0 writes; on other ranks every method does nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from olmo_train.log.console import Console
from olmo_train.log.recorder import Recorder
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig


class _Silent:
    """In place of Recorder and Console on ranks other than 0: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None


class RunLogger:
    def __init__(self, config: TrainConfig, world: World, last_step: int, resolved: dict[str, Any]):
        """`last_step`: the last step before this start; `resolved`: the whole configuration as plain data."""
        run_dir = Path(config.run_dir)
        self._committed_step = last_step or -1  # a fresh run may save its step 0
        self._recorder = world.on_main_only(lambda: Recorder(run_dir, config.log, resolved, last_step)) or _Silent()
        every = config.eval.interval_steps
        self._console = world.on_main_only(lambda: Console(config.run_dir, last_step, config.steps, every)) or _Silent()
        self.event, self.sync = self._recorder.event, self._recorder.sync
        self.say, self.count, self.early = self._console.say, self._console.step, self._console.early

    def log(self, step: int, line: dict[str, Any]) -> None:
        """One line of metrics."""
        self._recorder.log(step, line)
        self._console.log(step, line)

    def note_commit(self, step: int) -> None:
        """Log once that the checkpoint of a step is committed: no resume repeats steps up to it, so mirrors may upload them."""
        if step > self._committed_step:
            self._committed_step = step
            self.event("save", step)
        self._recorder.settle(step)

    def finish(self, step: int, checkpoint: Path) -> None:
        """The run is done and its last checkpoint committed."""
        self.event("finish", step)
        self._console.finish(checkpoint)

    def close(self) -> None:
        self._console.close()
        self._recorder.close()

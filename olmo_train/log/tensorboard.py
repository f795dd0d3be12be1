"""The TensorBoard mirror of a run."""

from __future__ import annotations

import logging
from pathlib import Path

from olmo_train.errors import ConfigError
from olmo_train.log.config import FACTS

log = logging.getLogger(__name__)


class TensorboardMirror:
    """The metrics as TensorBoard event files under run_dir/tensorboard."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, last_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as problem:
            raise ConfigError(
                "log.tensorboard", "needs the package tensorboard; pip install 'olmo-train[tensorboard]'"
            ) from problem
        self.sent, self._facts = last_step, ""
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)  # drops steps that will repeat

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name != "time" and name not in FACTS:
                self._writer.add_scalar(name, value, global_step=step, walltime=metrics["time"])
        facts = "  \n".join(f"{name}: {metrics[name]}" for name in FACTS if name in metrics)
        if facts != self._facts:
            self._writer.add_text("run", facts, global_step=step, walltime=metrics["time"])
            self._facts = facts
        self._writer.flush()

    def settle(self, step: int) -> None:
        """No line waits for a checkpoint."""

    def close(self) -> None:
        self._writer.close()

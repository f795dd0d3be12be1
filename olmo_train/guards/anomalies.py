"""What to do after a non-finite step or a loss spike: record it, skip it, stop the run, or rewind.

train_step flags each step on the device. The flags are read here, the same on all ranks, and on a GPU several steps later,
because each read is a host sync.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from olmo_train.checkpoint import folders as checkpoints
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.errors import NonFiniteError
from olmo_train.guards.forensics import Forensics
from olmo_train.guards.nonfinite import check_skipped, look_at, name_checkpoint
from olmo_train.guards.rewind import Rewind, plan_rewind
from olmo_train.history import History
from olmo_train.log.interval import StepStats, has_no_scored_token
from olmo_train.log.run_logger import RunLogger
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig

log = logging.getLogger(__name__)
READ_AT_ONCE = {"cpu"}  # devices on which reading a step's flags needs no host sync
UNREAD_STEPS = 16  # on other devices, read the flags at least every N steps


class AnomalyGuard:
    """Reads which steps were skipped or were spikes, and does what guards.spike and guards.max_skipped say."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        logger: RunLogger,
        checkpointer: Checkpointer,
        forensics: Forensics,
        first_step: int,
        skipped_in_a_row: int,
    ):
        """`first_step`: the step the run began from; `skipped_in_a_row`: at the checkpoint it resumes from."""
        self.config, self.world, self.logger, self.checkpointer = config, world, logger, checkpointer
        self.forensics = forensics
        self.run_dir, self.first_step, self.in_a_row = Path(config.run_dir), first_step, skipped_in_a_row
        self.rewinds = world.on_main(lambda: History(self.run_dir).rewinds)
        self.passed_over = set(config.guards.skip_steps).union(*(rewind["skipped"] for rewind in self.rewinds))
        self._warned_of_unscored = False
        self._unread: list[StepStats] = []  # steps whose flags have not been read yet

    def add(self, stats: StepStats) -> None:
        """Add a step; its flags are read now or within UNREAD_STEPS steps."""
        self._unread.append(stats)
        most = min(self.config.guards.max_skipped, UNREAD_STEPS)
        if self.world.device.type in READ_AT_ONCE or len(self._unread) == most:
            self.read()

    def read(self) -> None:
        """Read the flags of all unread steps: one host sync, the same on all ranks.

        Raises NonFiniteError when too many steps in a row were skipped or a spike must stop the run, and Rewind.
        """
        steps, self._unread = self._unread, []
        rows = [torch.stack((stats.skipped, stats.spike, has_no_scored_token(stats.sums))) for stats in steps]
        flags = torch.stack(rows).tolist() if steps else []
        for stats, (skipped, spike, unscored) in zip(steps, flags, strict=True):
            if unscored:
                self._note_unscored(stats)
                continue
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped or spike:
                evidence = self._record(stats, bool(spike))
            if skipped:
                check_skipped(self.in_a_row, self.config.guards, checkpoints.newest_folder(self.run_dir), evidence)
            elif spike and self.config.guards.spike != "record":
                self._stop_or_rewind(stats, evidence)

    def _note_unscored(self, stats: StepStats) -> None:
        """Log an event each time and one warning. Does not count for guards.max_skipped: the training is fine."""
        self.logger.event("skip", stats.step, why="no scored token in this batch", learning_rate=stats.lr)
        if self.world.is_main and not self._warned_of_unscored:
            log.warning(
                "step %d: no scored token in this batch, all its labels are masked; the optimizer skips such steps, and "
                "`skipped` counts them; look at the data with inspect-data --step %d", stats.step, stats.step,
            )  # fmt: skip
        self._warned_of_unscored = True

    def _record(self, stats: StepStats, spike: bool) -> Path | None:
        """Log an event, write forensics and print one line; returns the folder, or None if it could not be written."""
        why, done = ("spike", self.config.guards.spike) if spike else ("skip", "skip")
        about = {"loss": stats.loss.item(), "grad_norm": stats.grad_norm.item(), "learning_rate": stats.lr}
        self.logger.event(why, stats.step, **about)
        evidence = self.forensics.write(stats, why, done)
        what = "is a spike" + " and is skipped" * (done == "skip") if spike else "is skipped"
        self.logger.say(
            f"step {stats.step} {what}: loss {about['loss']:.4g}, gradient norm {about['grad_norm']:.4g}"
            + (f"; see {evidence}" if evidence else "")
        )
        return evidence

    def _stop_or_rewind(self, stats: StepStats, evidence: Path | None) -> None:
        """Raise NonFiniteError or Rewind: no state after this step is ever saved."""
        self.checkpointer.wait()
        step, config = stats.step, self.config.guards
        folders = self.world.on_main(lambda: checkpoints.committed(self.run_dir))
        if config.spike == "stop":
            raise NonFiniteError(
                "guards.spike",
                f"step {step} is a spike, its loss {stats.loss.item():.4g} or gradient norm {stats.grad_norm.item():.4g} is far "
                f"above those before; {name_checkpoint(next(reversed(folders.values()), None))}; {look_at(evidence)}"
                f"run again with guards.skip_steps=[{step}] to pass over its batch, or with guards.spike=record",
            )
        rewind = plan_rewind(step, next(reversed(folders), self.first_step), self.rewinds, config, evidence)
        self.logger.event("rewind", step, **rewind)
        self.logger.sync()  # a run that is killed from here on must pass over the same steps
        self.logger.say(
            f"rewinding from step {step} to step {rewind['to']}, passing over step{'s' * (len(rewind['skipped']) > 1)} "
            f"{', '.join(map(str, rewind['skipped']))}"
        )
        self.world.barrier()
        raise Rewind

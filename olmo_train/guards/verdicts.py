"""What becomes of a step that is not finite or stands out: told, skipped, stopped at, or gone back before.

The device judges each step (train_step); here its verdicts are read, some steps later where reading waits for the device,
and the same on all ranks.
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
from olmo_train.history import rewound
from olmo_train.log.interval import StepStats, has_no_scored_token
from olmo_train.log.records import Records
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig

log = logging.getLogger(__name__)
READ_AT_ONCE = {"cpu"}  # devices on which reading a step's figures does not wait for anything
UNREAD_STEPS = 16  # elsewhere, at most so many steps until it is read whether one was skipped or a spike


class Verdicts:
    """Reads whether steps were skipped or spikes, and does what the configuration says then."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        records: Records,
        checkpointer: Checkpointer,
        forensics: Forensics,
        first_step: int,
        skipped_in_a_row: int,
    ):
        """`first_step`: from which the run began; `skipped_in_a_row`: just before the step that it goes on from."""
        self.config, self.world, self.records, self.checkpointer = config, world, records, checkpointer
        self.forensics = forensics
        self.run_dir, self.first_step, self.in_a_row = Path(config.run_dir), first_step, skipped_in_a_row
        self.rewinds = world.on_main(lambda: rewound(self.run_dir))
        self.passed_over = set(config.guards.skip_steps).union(*(rewind["skipped"] for rewind in self.rewinds))
        self._warned_of_unscored = False
        self._unread: list[StepStats] = []  # steps of which nothing has been read from the device yet

    def add(self, stats: StepStats) -> None:
        self._unread.append(stats)
        most = min(self.config.guards.max_skipped, UNREAD_STEPS)
        if self.world.device.type in READ_AT_ONCE or len(self._unread) == most:
            self.read()

    def read(self) -> None:
        """Read which of the steps since the last reading were skipped or spikes: one host sync, the same on all ranks.

        Raises NonFiniteError when too many in a row were skipped or a spike is to stop the run, and Rewind.
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
                evidence = self._tell(stats, bool(spike))
            if skipped:
                check_skipped(self.in_a_row, self.config.guards, checkpoints.newest_folder(self.run_dir), evidence)
            elif spike and self.config.guards.spike != "record":
                self._leave(stats, evidence)

    def _note_unscored(self, stats: StepStats) -> None:
        """An event each time and one warning. It does not count for guards.max_skipped: nothing is wrong with the training."""
        self.records.event("skip", stats.step, why="no scored token in this batch", learning_rate=stats.lr)
        if self.world.is_main and not self._warned_of_unscored:
            log.warning(
                "step %d: no scored token in this batch, all its labels are masked; the optimizer skips it and later ones, and "
                "`skipped` counts them; look at the data with inspect-data --step %d", stats.step, stats.step,
            )  # fmt: skip
        self._warned_of_unscored = True

    def _tell(self, stats: StepStats, spike: bool) -> Path | None:
        """Into the record, and with its evidence; gives the folder of that, None where it could not be written."""
        why, done = ("spike", self.config.guards.spike) if spike else ("skip", "skip")
        about = {"loss": stats.loss.item(), "grad_norm": stats.grad_norm.item(), "learning_rate": stats.lr}
        self.records.event(why, stats.step, **about)
        return self.forensics.write(stats, why, done)

    def _leave(self, stats: StepStats, evidence: Path | None) -> None:
        """Raises NonFiniteError or Rewind: no state after this step is ever saved."""
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
        self.records.event("rewind", step, **rewind)
        self.records.sync()  # before anything goes on: a run killed from here on passes over the same steps
        self.records.say(
            f"step {step} is a spike (loss {stats.loss.item():.4g}, gradient norm {stats.grad_norm.item():.4g}): "
            f"back to step {rewind['to']}, and passing over step{'s' * (len(rewind['skipped']) > 1)} "
            f"{', '.join(map(str, rewind['skipped']))}"
        )
        self.world.barrier()
        raise Rewind

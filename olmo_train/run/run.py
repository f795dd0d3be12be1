"""What the training loop calls around its steps: the next batch, logging, evaluating, saving, stopping."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmo_train.checkpoint import folders, load
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.data.loader import Batch, Loader
from olmo_train.data.mixture import Mixture
from olmo_train.errors import ReplicaError, Stopped
from olmo_train.eval.during_run import Evaluation
from olmo_train.formats import counted, extent
from olmo_train.guards.anomalies import AnomalyGuard
from olmo_train.guards.nonfinite import name_checkpoint
from olmo_train.guards.replicas import divergence
from olmo_train.guards.signals import StopSignals
from olmo_train.guards.spikes import SpikeDetector
from olmo_train.guards.watchdog import Watchdog
from olmo_train.history import History
from olmo_train.log.interval import StepStats
from olmo_train.log.journal import Journal
from olmo_train.log.run_logger import RunLogger
from olmo_train.model.adapter import is_adapter
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import kernels
from olmo_train.parallel.world import World
from olmo_train.plan import preflight
from olmo_train.run.start import Start
from olmo_train.train_config import TrainConfig

GARBAGE_STEPS = 100  # run Python's garbage collector every N steps, on all ranks at the same step
COMPILING = "compiling: the first step takes about half a minute longer, less if the cache has its kernels"
SAVE_FAILED = 1 << 16  # in agree_to_stop, above all numbers of signals


@dataclass
class Run:
    """An open run, made by open_run on every rank."""

    config: TrainConfig  # with total_steps set
    world: World
    signals: StopSignals
    start: Start
    mixture: Mixture
    evaluation: Evaluation
    watchdog: Watchdog
    logger: RunLogger
    journal: Journal
    checkpointer: Checkpointer
    anomalies: AnomalyGuard
    spikes: SpikeDetector
    pending_line: dict[str, Any] | None  # the metrics of a step whose evaluation a signal interrupted

    def __post_init__(self) -> None:
        self.done = self.start.step  # the last step that this process knows to be done
        self.run_dir = Path(self.config.run_dir)

    def begin(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Describe the run, finish an interrupted evaluation, and save step 0 if the configuration says so."""
        if self.world.is_main:
            self._describe(model)
            self.signals.warn_if_too_slow(History(self.run_dir).last_figures())
        if self.pending_line is not None:
            line, self.pending_line = self.pending_line, None
            self.log(self.start.step, self.evaluate(self.start.step, line, model))
            self.world.on_main(lambda: folders.write_best(self.run_dir, self.evaluation.best.record()))
        if self.start.step == 0 and 0 in self.config.checkpoint.save_steps and self.checkpointer.last_step is None:
            self.save(0, model, optimizer)
        self.journal.clock.restart()

    def _describe(self, model: Transformer) -> None:
        config = self.config
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        n_parameters = sum(size for name, size in sizes.items() if not is_adapter(name))
        how = f"resumes from {self.start.folder}" if self.start.folder else "starts"
        self.logger.say(
            f"{config.run_dir} {how}: {n_parameters:,} parameters, "
            f"{counted(config.steps, 'step')} of {extent(size * config.model.seq_len for size in config.batches.sizes)} tokens, "
            f"{self.world.size} x {self.world.device.type}, {config.parallel.precision}"
            + (", C++ kernels" if kernels.uses_cpu_kernels(model) else ", C++ loss" * (config.parallel.cpu_kernels == "loss"))
            + (", compiled" if model.is_compiled else "")
        )
        if config.adapter.is_on:
            n_trained = sum(sizes.values()) - n_parameters
            self.logger.say(f"{config.adapter.kind}: {n_trained:,} of {n_parameters:,} parameters are trained")
        for line in [*preflight.facts(config, self.mixture), *[COMPILING] * bool(model.is_compiled)]:
            self.logger.say(line)

    def steps(self) -> Iterator[int]:
        """The steps to compute: up to the last one, or to the evaluation after which eval.stop_after ends the run."""
        for step in range(self.start.step + 1, self.config.steps + 1):
            if self.evaluation.best.ends_run:
                return
            yield step

    def loader(self) -> Loader:
        """The batches of this rank, from the first step on."""
        return Loader(self.mixture, self.world.data_rank, self.world.data_size, self.world.device, self.start.step + 1)

    def next_batch(self, loader: Loader) -> Batch | None:
        """This rank's next batch; None when a signal came while waiting for it."""
        started = time.perf_counter()
        self.watchdog.heartbeat(self.done, "waits for its batch")
        batch = loader.get(give_up=lambda: self.signals.received)
        self.watchdog.heartbeat(self.done, "in the next step", batch.sample_hash if batch else "")
        self.signals.step = batch.step if batch else self.done
        self.journal.begin_step(time.perf_counter() - started)
        return batch

    def agree_to_stop(self) -> bool:
        """Whether any rank received a stop signal: the same answer on every rank. Raises SaveError on all ranks when a save has
        failed."""
        agreed = self.world.any(SAVE_FAILED if self.checkpointer.failed() else self.signals.received)
        if agreed == SAVE_FAILED:
            self.checkpointer.wait()
            agreed = self.world.any(self.signals.received)
        if agreed:
            self.signals.agree(agreed, self.done)
        return bool(agreed)

    def add(self, stats: StepStats) -> None:
        """Count a step and guard against it; on a GPU, where reading waits for the step, that may be some steps later."""
        self.done = stats.step
        self.watchdog.heartbeat(stats.step)
        if stats.step % GARBAGE_STEPS == 0:
            gc.collect()
        self.journal.add(stats)
        if not stats.passed_over:
            self.anomalies.add(stats)

    def evaluate(self, step: int, line: dict[str, Any], model: Transformer) -> dict[str, Any]:
        """The line of this step with the results of its evaluation; nothing when a signal interrupted the evaluation.

        Then the line goes into the checkpoint, and the resumed run evaluates this step and logs it.
        """
        with self.journal.clock.paused():
            metrics = self.evaluation.measure(model, lambda: self.watchdog.heartbeat(step, "evaluates"), self.agree_to_stop)
        if metrics is None:
            self.pending_line = line
            return {}
        self.logger.event("evaluation", step)
        self.evaluation.best.add(step, metrics)
        if self.evaluation.best.ends_run:
            self.logger.say(f"the run ends after step {step}: {self.evaluation.best}")
        return line | metrics

    def log(self, step: int, line: dict[str, Any]) -> None:
        """Write a line of metrics, if there is one."""
        if line:
            self.logger.log(step, line)
            self.logger.note_commit(self.checkpointer.committed_step)
            if self.world.is_main:
                self.signals.warn_if_too_slow(line)

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Save the state after this step; metrics up to it are flushed first."""
        self.anomalies.read()  # no state after a spike that must stop or rewind the run is saved
        with self.journal.clock.paused(), self.watchdog.patient("saves"):
            self.check_replicas(step, model, optimizer)
            self.logger.sync()
            state = self.journal.state(step) | {
                "attempt": self.journal.attempt,
                "world_size": self.world.size,
                "data": self.mixture.fingerprint,
                "denied": self.mixture.denied_summary,
                "batches": self.mixture.batches.changes,
                "spikes": self.spikes.state(),
                "skipped_in_a_row": self.anomalies.in_a_row,
                "pending_line": self.pending_line,
                "best": self.evaluation.best.record(),
                "cpu_kernels": self.config.parallel.cpu_kernels,
            }
            if self.start.base:
                state["base"] = self.start.base
            self.checkpointer.save(step, model, optimizer, state)
        self.logger.note_commit(self.checkpointer.committed_step)

    def check_replicas(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Raise ReplicaError on every rank when ranks that must hold the same bits do not."""
        updates = torch.stack([state["step"] for state in optimizer.state.values()])
        tensors = load.state_tensors(model, optimizer)
        # Weights frozen under adapters are not among them, and no update would ever overwrite a flipped bit.
        tensors |= {f"model.{name}": p.detach() for name, p in model.named_parameters() if f"model.{name}" not in tensors}
        alike = {"the optimizer's count of updates": updates}
        if found := divergence(tensors, alike, self.world, self.config.parallel.replicas):
            self._finish_saving()
            kept = name_checkpoint(folders.newest_folder(self.run_dir))
            raise ReplicaError(
                "guards.replica_check_steps",
                f"after step {step} {found}; this state is not saved, and {kept}; "
                "run the same command again, without that device if it happens twice",
            )

    def save_and_stop(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Raises Stopped when the state after this step is committed, and SaveError when it cannot be, required or not."""
        self.logger.event("signal", step, signal=self.signals.received)
        if self.checkpointer.last_step != step:
            self.save(step, model, optimizer)
        self._finish_saving(leaving=True)
        assert self.checkpointer.committed_step == step, (self.checkpointer.committed_step, step)
        self.signals.is_saved = True
        name = signal.Signals(self.signals.received).name
        raise Stopped(name, f"saved after step {step} of {self.config.steps}; run the same command again to resume")

    def finish(self) -> None:
        """Wait for the last save, and log the end of the run."""
        self._finish_saving(leaving=True)
        checkpoint = folders.newest_folder(self.run_dir)
        assert checkpoint is not None  # the last step is saved
        self.logger.finish(self.done, checkpoint)

    def _finish_saving(self, leaving: bool = False) -> None:
        """Wait for the last save. `leaving`: a failed save is an error, as no later one follows; see Checkpointer.wait."""
        with self.watchdog.patient("saves"):
            self.checkpointer.wait(leaving)
        self.logger.note_commit(self.checkpointer.committed_step)

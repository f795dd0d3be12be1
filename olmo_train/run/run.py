"""Open, stop and finish a run: its run_dir, data, records, guards and checkpoints. The loop itself is in train.py."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from olmo_train import config as configuration
from olmo_train.checkpoint import folders, load
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.data.loader import Batch, Loader
from olmo_train.data.shards import check_ids
from olmo_train.data.tokenizer import CONFIG_FILE, config_file, record_of_folder
from olmo_train.errors import ConfigError, DataError, ReplicaError, Stopped
from olmo_train.eval.during_run import Evaluation
from olmo_train.guards.anomalies import AnomalyGuard
from olmo_train.guards.forensics import Forensics
from olmo_train.guards.nonfinite import name_checkpoint
from olmo_train.guards.replicas import divergence
from olmo_train.guards.signals import StopSignals, too_slow_to_stop
from olmo_train.guards.spikes import SpikeDetector
from olmo_train.guards.watchdog import Watchdog, new_heartbeats
from olmo_train.history import History
from olmo_train.log.interval import StepStats
from olmo_train.log.journal import Journal
from olmo_train.log.profiling import StepProfiler
from olmo_train.log.run_logger import RunLogger
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import kernels
from olmo_train.parallel.world import World, explain_lost_peers
from olmo_train.run.start import find_checkpoint, owed_line, read_start
from olmo_train.storage import RunLock, replace_file
from olmo_train.train_config import TrainConfig, schedule_warnings

log = logging.getLogger(__name__)
GARBAGE_STEPS = 100  # run Python's garbage collector every N steps, on all ranks at the same step
CHECKED_TOKENS = 10**9  # a source of at most N tokens is checked completely before the first step, in seconds


class Run:
    """Everything around the training loop: the run_dir, the data, the log. Entered once, on every rank."""

    def __init__(self, config: TrainConfig, world: World, signals: StopSignals):
        config.check_world(world.data_size)
        self.config, self.world, self.signals = config, world, signals  # total_steps is set once the batch sizes are known
        self.resolved = configuration.to_dict(config)
        self.run_dir = Path(config.run_dir)
        self.stack = contextlib.ExitStack()
        self.warned_of_stop = False

    def __enter__(self) -> Run:
        with self.stack:  # after an error, close what was opened before it
            self._open()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)

    def _open(self) -> None:
        config, world = self.config, self.world
        self.mixture = world.together(config.mixture)
        self.evaluation = world.together(lambda: Evaluation(config, world, self.mixture))
        world.on_main(lambda: self.mixture.check_tokenizers(self.evaluation.sources, self.evaluation.tokenizer))
        world.on_main(self._check_ids)
        world.on_main(self._lock_run_dir)
        found = world.on_main(lambda: find_checkpoint(config))
        self.start = start = world.together(lambda: read_start(config, self.resolved, self.mixture, *found))
        self.mixture.set_batches(start.batches)
        self.config = config = dataclasses.replace(config, total_steps=config.steps_with(start.batches), total_tokens=None)
        self.done = start.step  # the last step that this process knows to be done
        self.pending_line: dict[str, Any] | None = world.on_main(lambda: owed_line(self.run_dir, start))
        if self.is_finished:
            if world.is_main:
                print(f"{self.run_dir} is finished: {start.step} of {config.steps} steps; set total_steps higher to go on")
            return
        world.on_main(self._check_checkpoint_tokenizer)
        self._open_records()

    def _open_records(self) -> None:
        config, world, start = self.config, self.world, self.start
        self._open_watchdog()
        resolved = configuration.dump(self.resolved, os.getcwd())
        world.on_main(lambda: replace_file(self.run_dir / "config.yaml", resolved.encode()))
        attempt = world.on_main(lambda: 1 + len(History(self.run_dir).starts))
        self.logger = self.stack.enter_context(contextlib.closing(RunLogger(config, world, start.step, self.resolved)))
        self.journal = Journal(config, world, self.mixture, self.logger, attempt, start.state)
        self.spikes = SpikeDetector(world.device, start.state.get("spikes"))
        files = world.on_main_only(self._checkpoint_files) or {}  # rank 0 alone writes them
        resumed = start.step if start.kind == "resume" else None
        checkpointer = Checkpointer(self.run_dir, config.checkpoint, world, files, resumed)
        self.checkpointer = self.stack.enter_context(contextlib.closing(checkpointer))
        self.noted_step = checkpointer.committed_step  # step of the last "save" event
        in_a_row = self.journal.interval.skipped_in_a_row()
        forensics = Forensics(self.run_dir, self.mixture, world, attempt, self.watchdog)
        self.anomalies = AnomalyGuard(config, world, self.logger, checkpointer, forensics, start.first_step, in_a_row)
        if world.is_main:
            saved = configuration.read([start.folder / "config.yaml"]) if start.kind == "resume" else None
            for warning in schedule_warnings(config, saved, start.batches, start.step):
                log.warning(warning)
        about = {"attempt": attempt, "world_size": world.size, "data_size": world.data_size}
        about["checkpoint"] = str(start.folder or "")
        about |= {"batches": start.batches.changes, "total_steps": config.steps, "config": self.resolved}
        about["started_in"] = os.getcwd()
        self.logger.event(start.kind, start.step, **about)

    def _open_watchdog(self) -> None:
        """Start the watchdog: from here on, errors name the rank that failed or hangs."""
        folder = self.world.on_main(lambda: new_heartbeats(self.run_dir))

        def start() -> None:
            self.watchdog = Watchdog(self.config.guards.hang_seconds, self.run_dir, folder, self.world.rank, self.world.size)
            self.stack.callback(self.watchdog.close)

        self.world.together(start)
        self.stack.enter_context(self.watchdog.exit_report())
        self.stack.enter_context(explain_lost_peers())

    @property
    def is_finished(self) -> bool:
        return self.start.step >= self.config.steps and self.pending_line is None

    def _check_ids(self) -> None:
        """Check every token id of sources up to CHECKED_TOKENS; larger sources are checked batch by batch."""
        for source in (*self.mixture.sources, *self.evaluation.sources):
            if source.n_tokens <= CHECKED_TOKENS:
                check_ids(source, self.config.model.vocab_size)

    def _check_checkpoint_tokenizer(self) -> None:
        """Check that the data have the tokenizer that the initial weights were trained with."""
        first = self.config.init_from
        folder = self.start.folder or (folders.resolve(Path(first)) if first else None)
        if folder:
            self.mixture.check_tokenizers((), record_of_folder(folder))

    def _lock_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.stack.enter_context(RunLock(self.run_dir))
            folders.put_back(self.run_dir)
        except OSError as problem:
            raise ConfigError("run_dir", f"{self.run_dir} cannot be written: {problem}") from problem

    def _checkpoint_files(self) -> dict[str, bytes]:
        files = {"config.yaml": configuration.dump(self.resolved, os.getcwd()).encode()}
        prepared = next((source for source in self.mixture.sources if source.folder), None)
        if prepared:
            files[CONFIG_FILE] = config_file(prepared.meta.eos_text)
            try:
                files["tokenizer.json"] = (prepared.folder / "tokenizer.json").read_bytes()
            except OSError as problem:
                file = prepared.folder / "tokenizer.json"
                raise DataError(file, f"cannot be read: {problem}; prepare the data again") from problem
        return files

    def begin(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Introduce the run, and make up for what its start owes: an interrupted evaluation, a checkpoint of step 0."""
        if self.world.is_main:
            self._log_start(model)
        if self.pending_line is not None:
            line, self.pending_line = self.pending_line, None
            self.log(self.start.step, self.evaluate(self.start.step, line, model))
        if self.start.step == 0 and 0 in self.config.checkpoint.save_steps and self.checkpointer.last_step is None:
            self.save(0, model, optimizer)
        self.journal.clock.restart()

    def _log_start(self, model: Transformer) -> None:
        config, n_parameters = self.config, sum(p.numel() for p in model.parameters())
        how = f"resumes from {self.start.folder}" if self.start.folder else "starts"
        self.logger.say(
            f"{config.run_dir} {how}: {n_parameters:,} parameters, "
            f"{config.steps:,} steps of {config.tokens_per_step:,} tokens, "
            f"{self.world.size} x {self.world.device.type}, {config.parallel.precision}"
            + (", C++ kernels" if kernels.uses_cpu_kernels(model) else "")
        )
        parts = [f"{name} {epoch:.3g}" for name, epoch in self.mixture.epochs(config.steps).items()]
        self.logger.say(f"epochs of each source over the run:  {', '.join(parts)}")

    def loader(self) -> Loader:
        return Loader(self.mixture, self.world.data_rank, self.world.data_size, self.world.device, self.start.step + 1)

    def profiler(self) -> StepProfiler:
        return StepProfiler(self.config.profile, self.run_dir / "profile", self.world.rank)

    def next_batch(self, loader: Loader) -> Batch | None:
        """This rank's next batch; None when a signal came while waiting for it."""
        started = time.perf_counter()
        self.watchdog.heartbeat(self.done, "waits for its batch")
        batch = loader.get(give_up=lambda: self.signals.received)
        self.watchdog.heartbeat(self.done, "in the next step", batch.sample_hash if batch else "")
        self.journal.begin_step(time.perf_counter() - started)
        return batch

    def agree_to_stop(self) -> bool:
        """Whether any rank received a stop signal: the same answer on every rank. Raises SaveError on all ranks when a save has
        failed."""
        failed, received = 1 << 16, self.signals.received
        agreed = self.world.any(failed if self.checkpointer.failed() else received)
        if agreed == failed:
            self.checkpointer.wait()
            agreed = self.world.any(received)
        if agreed and not received:
            self.signals.received = agreed
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
        return line | metrics

    def log(self, step: int, line: dict[str, Any]) -> None:
        """Write a line of metrics, if there is one."""
        if line:
            self.logger.log(step, line)
            self._note_commit()
            self._warn_when_too_slow_to_stop(line)

    def _warn_when_too_slow_to_stop(self, line: dict[str, Any]) -> None:
        save_seconds = line.get("throughput/checkpoint_write_seconds")
        if save_seconds is not None and self.world.is_main and not self.warned_of_stop:
            warning = too_slow_to_stop(line["throughput/step_seconds"], save_seconds)
            self.warned_of_stop = warning is not None
            if warning:
                log.warning(warning)

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
                "pending_line": self.pending_line,
            }
            self.checkpointer.save(step, model, optimizer, state)
        self._note_commit()

    def check_replicas(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Raise ReplicaError on every rank when ranks that must hold the same bits do not."""
        updates = torch.stack([state["step"] for state in optimizer.state.values()])
        tensors, alike = load.state_tensors(model, optimizer), {"the optimizer's count of updates": updates}
        if found := divergence(tensors, alike, self.world, self.config.parallel.replicas):
            self._settle()
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
        self._settle(leaving=True)
        assert self.checkpointer.committed_step == step, (self.checkpointer.committed_step, step)
        name = signal.Signals(self.signals.received).name
        raise Stopped(name, f"stopped after step {step} of {self.config.steps} and saved; run the same command again to resume")

    def finish(self) -> None:
        self._settle(leaving=True)
        self.logger.event("finish", self.config.steps)

    def _settle(self, leaving: bool = False) -> None:
        """Wait for the last save. `leaving`: a failed save is an error, as no later one follows; see Checkpointer.wait."""
        with self.watchdog.patient("saves"):
            self.checkpointer.wait(leaving)
        self._note_commit()

    def _note_commit(self) -> None:
        """Log the "save" event, only after the checkpoint is committed."""
        step = self.checkpointer.committed_step
        if step != self.noted_step:
            self.noted_step = step
            self.logger.event("save", step)
        self.logger.settle(step)

"""Everything around the training loop: the run_dir, the data, the model, logging, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import signal
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from olmo_train import config as configuration
from olmo_train import hardware
from olmo_train.checkpoint import folders, load
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.data.loader import Batch, Loader
from olmo_train.data.mixture import Mixture
from olmo_train.data.order import BatchSizes
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
from olmo_train.history import attempts, is_logged
from olmo_train.log import energy as log_energy
from olmo_train.log.interval import Clock, Interval, StepStats, slow_ranks, throughput_metrics
from olmo_train.log.profiling import StepProfiler
from olmo_train.log.run_logger import RunLogger
from olmo_train.model.cost import flops_per_token
from olmo_train.model.transformer import Transformer
from olmo_train.optim import build, schedules
from olmo_train.parallel import kernels, shard
from olmo_train.parallel.world import World, explain_lost_peers
from olmo_train.run.resume import check_changes, check_data, check_denied, check_skip_steps
from olmo_train.storage import RunLock, replace_file
from olmo_train.train_config import TrainConfig, schedule_warnings

log = logging.getLogger(__name__)
GARBAGE_STEPS = 100  # run Python's garbage collector every N steps, on all ranks at the same step
CHECKED_TOKENS = 10**9  # a source of at most N tokens is checked completely before the first step, in seconds


class Run:
    """Everything around the training loop: the run_dir, the data, the log. Entered once, on every rank."""

    def __init__(self, config: TrainConfig, world: World, signals: StopSignals):
        config.check_world(world.size)
        self.config, self.world, self.signals = config, world, signals  # total_steps is set once the batch sizes are known
        self.resolved = configuration.to_dict(config)
        self.run_dir = Path(config.run_dir)
        self.stack = contextlib.ExitStack()
        self.warned_of_stop = False
        self.own_seconds = 0.0  # this rank's work since the last line of metrics: data wait and CPU time of this thread
        self.quiet_until = 0  # log a slow rank again after this step

    def __enter__(self) -> Run:
        with self.stack:  # after an error, close what was opened before it
            self._open()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)

    def _open(self) -> None:
        config, world, shape = self.config, self.world, self.config.model
        batch_size = config.global_batch_size
        self.mixture = world.together(lambda: Mixture(config.data, config.seed, batch_size, shape.seq_len, shape.vocab_size))
        self.evaluation = world.together(lambda: Evaluation(config, world, self.mixture))
        world.on_main(lambda: self.mixture.check_tokenizers(self.evaluation.sources, self.evaluation.tokenizer))
        world.on_main(self._check_ids)
        world.on_main(self._lock_run_dir)
        self.folder = world.on_main(lambda: folders.newest(self.run_dir, config.resume == "strict"))
        self.is_branch = self.folder is None and config.resume_from is not None
        if self.is_branch:
            self.folder = world.on_main(lambda: folders.resolve(Path(config.resume_from)))
        self.state = world.together(self._resumed_state) if self.folder else {"step": 0}
        self.last_step: int = self.state["step"]
        self.batches = self._batch_sizes()
        self.mixture.set_batches(self.batches)
        self.config = config = dataclasses.replace(config, total_steps=config.steps_with(self.batches), total_tokens=None)
        self.done = self.last_step  # the last finished step
        self.first_step = self.last_step if self.is_branch else 0  # the step the run began from
        self.pending_line: dict[str, Any] | None = world.on_main(self._find_pending_line)
        if self.is_finished:
            if world.is_main:
                print(f"{self.run_dir} is finished: {self.last_step} of {config.steps} steps; set total_steps higher to go on")
            return
        world.on_main(self._check_checkpoint_tokenizer)
        self._open_records()

    def _open_records(self) -> None:
        config, world = self.config, self.world
        self._open_watchdog()
        resolved = configuration.dump(self.resolved, os.getcwd())
        world.on_main(lambda: replace_file(self.run_dir / "config.yaml", resolved.encode()))
        self.attempt = world.on_main(lambda: 1 + attempts(self.run_dir))
        self.interval = Interval(len(self.mixture.names), world.device, self.state.get("interval"))
        self.spikes = SpikeDetector(world.device, self.state.get("spikes"))
        self.bytes_per_token = [s.n_bytes / s.n_tokens if s.n_bytes else None for s in self.mixture.sources]
        self.clock = Clock()
        self.meter, self.energy_before = log_energy.open_energy_meter(), self.state.get("energy_kwh") or 0.0
        self.logger = self.stack.enter_context(contextlib.closing(RunLogger(config, world, self.last_step, self.resolved)))
        files = world.on_main_only(self._checkpoint_files) or {}  # rank 0 alone writes them
        resumed = self.last_step if self.folder and not self.is_branch else None
        checkpointer = Checkpointer(self.run_dir, config.checkpoint, world, files, resumed)
        self.checkpointer = self.stack.enter_context(contextlib.closing(checkpointer))
        self.noted_step = checkpointer.committed_step  # step of the last "save" event
        in_a_row = self.interval.skipped_in_a_row()
        self.forensics = Forensics(self.run_dir, self.mixture, world, self.attempt, self.watchdog)
        self.anomalies = AnomalyGuard(config, world, self.logger, checkpointer, self.forensics, self.first_step, in_a_row)
        if world.is_main:
            saved = configuration.read([self.folder / "config.yaml"]) if self.folder and not self.is_branch else None
            for warning in schedule_warnings(config, saved, self.batches, self.last_step):
                log.warning(warning)
        how = "branch" if self.is_branch else "resume" if self.folder else "start"
        about = {"attempt": self.attempt, "world_size": world.size, "checkpoint": str(self.folder or "")}
        about |= {"batches": self.batches.changes, "total_steps": config.steps, "config": self.resolved}
        about["started_in"] = os.getcwd()
        self.logger.event(how, self.last_step, **about)

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
        return self.last_step >= self.config.steps and self.pending_line is None

    def _check_ids(self) -> None:
        """Check every token id of sources up to CHECKED_TOKENS; larger sources are checked batch by batch."""
        for source in (*self.mixture.sources, *self.evaluation.sources):
            if source.n_tokens <= CHECKED_TOKENS:
                check_ids(source, self.config.model.vocab_size)

    def _check_checkpoint_tokenizer(self) -> None:
        """Check that the data have the tokenizer that the initial weights were trained with."""
        start = self.config.init_from
        folder = self.folder or (folders.resolve(Path(start)) if start else None)
        if folder:
            self.mixture.check_tokenizers((), record_of_folder(folder))

    def _lock_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.stack.enter_context(RunLock(self.run_dir))
            folders.put_back(self.run_dir)
        except OSError as problem:
            raise ConfigError("run_dir", f"{self.run_dir} cannot be written: {problem}") from problem

    def _resumed_state(self) -> dict[str, Any]:
        """The state of the checkpoint to start from. A branch may change any key, a resumed run may not."""
        state = folders.read_state(self.folder)
        if not self.is_branch:
            saved = configuration.decoded(configuration.read([self.folder / "config.yaml"]))
            now = self.resolved
            check_changes(saved, now, self.config.allow_changes)
            check_skip_steps(saved, now, state["step"], self.config.allow_changes)
            check_data(state["data"], self.mixture.fingerprint, self.config.allow_changes)
            check_denied(state.get("denied"), self.mixture.denied_summary, self.config.allow_changes)
        return state

    def _find_pending_line(self) -> dict[str, Any] | None:
        """The unlogged line of the checkpoint's step, if a signal interrupted its evaluation.

        The checkpoint keeps it even after a later start has logged it, so metrics.jsonl decides. A branch does not log a step of
        its parent.
        """
        line = self.state.get("pending_line")
        return None if self.is_branch or line is None or is_logged(self.run_dir, self.last_step) else line  # type: ignore[return-value]

    def _batch_sizes(self) -> BatchSizes:
        """The batch sizes up to the checkpoint, and this configuration's from there on."""
        changes = self.state.get("batches", ())
        if self.folder and not changes:  # of an older version, or converted: one size up to here
            saved = configuration.decoded(configuration.read([self.folder / "config.yaml"]))
            changes = [(1, saved.get("global_batch_size", self.config.global_batch_size))]
        return BatchSizes(tuple(map(tuple, changes))).after(self.last_step, self.config.global_batch_size)

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

    def build(self) -> tuple[Transformer, torch.optim.Optimizer]:
        """The sharded model and its optimizer, initialized or loaded from the checkpoint."""
        config, world = self.config, self.world
        with torch.device("meta"):
            model = Transformer(config.model)
        deterministic = config.determinism == "world"
        shard.shard(model, config.parallel, world, config.global_batch_size if deterministic else None)
        optimizer = build.build_optimizer(dict(model.named_parameters()), config.optim, shard.on_full_tensor, deterministic)
        build.allocate_state(optimizer)
        if self.folder:
            load.load(self.folder, model, optimizer, world)
        elif config.init_from:
            load.load_weights(world.on_main(lambda: folders.resolve(Path(config.init_from))), model, world)
        else:
            shard.init_weights(model, config.seed)
        if world.is_main:
            self._log_start(model)
        if self.pending_line is not None:  # a signal interrupted the evaluation of the step that is resumed
            line, self.pending_line = self.pending_line, None
            self._evaluate_and_log(self.last_step, line, model)
        if self.last_step == 0 and 0 in config.checkpoint.save_steps and self.checkpointer.last_step is None:
            self.save(0, model, optimizer)
        self.clock.restart()
        return model, optimizer

    def _log_start(self, model: Transformer) -> None:
        config, n_parameters = self.config, sum(p.numel() for p in model.parameters())
        self.logger.say(
            f"{config.run_dir} {f'resumes from {self.folder}' if self.folder else 'starts'}: {n_parameters:,} parameters, "
            f"{config.steps:,} steps of {config.tokens_per_step:,} tokens, "
            f"{self.world.size} x {self.world.device.type}, {config.parallel.precision}"
            + (", C++ kernels" if kernels.uses_cpu_kernels(model) else "")
        )
        parts = [f"{name} {epoch:.3g}" for name, epoch in self.mixture.epochs(config.steps).items()]
        self.logger.say(f"epochs of each source over the run:  {', '.join(parts)}")

    def loader(self) -> Loader:
        return Loader(self.mixture, self.world.rank, self.world.size, self.world.device, self.last_step + 1)

    def profiler(self) -> StepProfiler:
        return StepProfiler(self.config.profile, self.run_dir / "profile", self.world.rank)

    def next_batch(self, loader: Loader) -> tuple[Batch | None, float]:
        """This rank's next batch and the seconds waited for it; None when a signal came while waiting."""
        started = time.perf_counter()
        self.watchdog.heartbeat(self.done, "waits for its batch")
        batch = loader.get(give_up=lambda: self.signals.received)
        self.watchdog.heartbeat(self.done, "in the next step", batch.sample_hash if batch else "")
        waited = time.perf_counter() - started
        self.own_seconds += waited
        self.computing_since = time.thread_time()
        return batch, waited

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

    def add(self, stats: StepStats, waited: float) -> None:
        """Count a step. On a GPU its flags may be read some steps later, because each read is a host sync."""
        self.done = stats.step
        self.own_seconds += time.thread_time() - self.computing_since
        self.watchdog.heartbeat(stats.step)
        if stats.step % GARBAGE_STEPS == 0:
            gc.collect()
        self.logger.count(stats.step)
        if self.config.parallel.compile and stats.step == self.last_step + 1:
            self.logger.say(f"the first step took {self.clock.seconds:.1f} s, including torch.compile")
        if stats.passed_over:
            self.interval.pass_over(waited)
            return
        clipped = (stats.grad_norm > schedules.max_grad_norm_at(stats.step, self.config.optim)).float()
        self.interval.add(stats.sums, stats.skipped, clipped, stats.spike, waited)
        self.anomalies.add(stats)

    def report(self, stats: StepStats, batch: Batch, model: Transformer) -> None:
        """Log and evaluate if this step is due: at most one line of metrics."""
        config, step = self.config, stats.step
        last = step == config.steps
        is_logged = last or step % config.log.interval_steps == 0
        is_evaluated = self.evaluation.is_due(step, last)
        if is_logged or is_evaluated:
            self.anomalies.read()
        line = self.train_metrics(stats, batch) if is_logged else {}
        if is_evaluated:
            line = line or self._about(batch) | {"skipped": int(stats.skipped.item())}
            self._evaluate_and_log(step, line, model)
        elif line:
            self._log(step, line)

    def train_metrics(self, stats: StepStats, batch: Batch) -> dict[str, Any]:
        """The metrics of the interval that ends with this step; starts the next interval."""
        config, world, device = self.config, self.world, hardware.detect()
        metrics = self.interval.metrics(self.mixture.names, self.bytes_per_token)
        metrics |= {"optim/total_grad_norm": stats.grad_norm.item(), "optim/learning_rate_group0": stats.lr}
        metrics |= throughput_metrics(
            steps=self.interval.timed_steps,
            seconds=self.clock.seconds,
            data_wait=self.interval.data_wait,
            tokens=self._tokens(stats.step),
            interval_tokens=self._tokens(stats.step) - self._tokens(stats.step - self.interval.timed_steps),
            flops_per_token=flops_per_token(config.model),
            world_size=world.size,
            peak_flops=device.peak_flops if device else None,
        )
        metrics |= {f"train/source/{name}/epoch": epoch for name, epoch in self.mixture.epochs(stats.step).items()}
        metrics |= self.checkpointer.take_figures()
        self._warn_when_too_slow_to_stop(metrics)
        self._warn_of_slow_ranks(stats.step)
        if world.device.type == "cuda":
            metrics["System/Peak GPU Memory (MB)"] = torch.cuda.max_memory_allocated() / 2**20
        if (energy := self._energy_kwh()) is not None:
            metrics["throughput/energy_kwh"] = energy
        self.interval.restart()
        self.clock.restart()
        return metrics | self._about(batch)

    def _tokens(self, step: int) -> int:
        """Tokens read by the end of this step."""
        return self.batches.places_before(step + 1) * self.config.model.seq_len

    def _warn_when_too_slow_to_stop(self, metrics: dict[str, Any]) -> None:
        save_seconds = metrics.get("throughput/checkpoint_write_seconds")
        if save_seconds is not None and self.world.is_main and not self.warned_of_stop:
            warning = too_slow_to_stop(metrics["throughput/step_seconds"], save_seconds)
            self.warned_of_stop = warning is not None
            if warning:
                log.warning(warning)

    def _warn_of_slow_ranks(self, step: int) -> None:
        """Compare the time each rank spends on its own work, without waiting for others, which makes all steps equally long."""
        if self.world.size == 1:
            return
        ranks = self.world.gather((self.own_seconds / max(self.interval.timed_steps, 1), socket.gethostname()))
        self.own_seconds = 0.0
        slow = slow_ranks([own for own, _ in ranks])
        if slow and step > self.quiet_until:
            self.quiet_until = step + 10 * self.config.log.interval_steps
            median = statistics.median_low(own for own, _ in ranks)
            for rank in slow:
                own, host = ranks[rank]
                self.logger.event("slow", step, rank=rank, host=host, own_seconds=own, median_seconds=median)
                if self.world.is_main:
                    log.warning(
                        "rank %d on %s is slow: %.3g s a step for its data and work, the median is %.3g s; "
                        "all ranks wait for it", rank, host, own, median,
                    )  # fmt: skip

    def _energy_kwh(self) -> float | None:
        """Energy of all GPUs for all steps so far, also before a resume; None if one cannot report it."""
        used = math.nan if self.meter is None else self.meter.kwh()
        total = self.world.sum(torch.tensor(used, dtype=torch.float64, device=self.world.device)).item()
        return None if math.isnan(total) else self.energy_before + total

    def _about(self, batch: Batch) -> dict[str, Any]:
        """The origin of each line of metrics."""
        return {"sample_hash": batch.sample_hash, "attempt": self.attempt, "world_size": self.world.size}

    def _evaluate_and_log(self, step: int, line: dict[str, Any], model: Transformer) -> None:
        with self.clock.paused():
            metrics = self.evaluation.measure(model, lambda: self.watchdog.heartbeat(step, "evaluates"), self.agree_to_stop)
        if metrics is None:
            self.pending_line = line  # saved in the checkpoint; the resumed run evaluates this step and logs the line
        else:
            self.logger.event("evaluation", step)
            self._log(step, line | metrics)

    def _log(self, step: int, line: dict[str, Any]) -> None:
        self.logger.log(step, line)
        self._note_commit()

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Save the state after this step; metrics up to it are flushed first."""
        self.anomalies.read()  # no state after a spike that must stop or rewind the run is saved
        with self.clock.paused(), self.watchdog.patient("saves"):
            self.check_replicas(step, model, optimizer)
            self.logger.sync()
            state = {
                "attempt": self.attempt,
                "world_size": self.world.size,
                "data": self.mixture.fingerprint,
                "denied": self.mixture.denied_summary,
                "total_tokens": self._tokens(step),
                "batches": self.batches.changes,
                "interval": self.interval.state(),
                "spikes": self.spikes.state(),
                "pending_line": self.pending_line,
                "energy_kwh": self._energy_kwh(),
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

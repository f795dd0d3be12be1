"""The run: read it from top to bottom and you know what training is here.

    for stats in train(config): ...

`train` yields after every update, so a user's own behaviour is the body of this loop; the command line merely drains it.
The same call again resumes from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import shutil
import signal
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from olmo_train import allocator, exact, hardware, optim, parallel
from olmo_train import checkpoint as checkpoints
from olmo_train import config as configuration
from olmo_train.checkpoint import Checkpointer
from olmo_train.console import Console
from olmo_train.data.loader import IGNORE, Batch, Loader, validation_batches
from olmo_train.data.mixture import Mixture
from olmo_train.data.shards import TokenSource, check_ids, open_source
from olmo_train.data.tokenizer import load_tokenizer
from olmo_train.distributed import World, join_world, peers_named
from olmo_train.errors import ConfigError, DataError, NonFiniteError, ReplicaError, Stopped
from olmo_train.eval.downstream import TokenizedTask, load_task, results_of, score
from olmo_train.eval.perplexity import loss_sums
from olmo_train.guards import (
    Rewind,
    StopSignals,
    check_skipped,
    name_checkpoint,
    plan_rewind,
    rewound,
    skip_if_not_finite,
    too_slow_to_stop,
)
from olmo_train.metrics import Recorder, attempts
from olmo_train.model.cost import flops_per_token
from olmo_train.model.transformer import Transformer
from olmo_train.profiling import StepProfiler, out_of_memory_told
from olmo_train.recipe import TrainConfig
from olmo_train.replicas import divergence
from olmo_train.resume import check_changes, check_data, check_skip_steps
from olmo_train.spikes import SpikeDetector
from olmo_train.stats import Clock, Interval, loss_metrics, throughput_metrics
from olmo_train.storage import RunLock, replace_file
from olmo_train.watchdog import Watchdog

log = logging.getLogger(__name__)
READ_AT_ONCE = {"cpu"}  # devices on which reading a step's figures does not wait for anything
UNREAD_STEPS = 16  # elsewhere, at most so many steps until it is read whether one was skipped or a spike
GARBAGE_STEPS = 100  # Python's cyclic garbage is collected every so many, on all ranks at the same one
CHECKED_TOKENS = 10**9  # a source of at most so many tokens is checked whole before the first step: some seconds


@dataclass(frozen=True)
class StepStats:
    """What one update was. Tensors lie on the device: reading one waits for it."""

    step: int  # counted from 1
    lr: float
    sums: Tensor  # (2, sources) float64: summed loss in nats and counted tokens of the global batch
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1.0 when nothing was changed: loss or gradient were not finite, or a spike that is to be skipped
    losses: Tensor  # (rows of this rank,) fp32: summed loss of each sequence
    spike: Tensor  # 1.0 when loss or norm stand out from those of the steps before
    passed_over: bool = False  # on purpose: nothing was computed

    @property
    def loss(self) -> Tensor:
        """Mean over the counted tokens (see loss_divisor) of the global batch, in nats."""
        return mean_loss(self.sums)


def mean_loss(sums: Tensor) -> Tensor:
    return sums[0].sum() / sums[1].sum().clamp(min=1)


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    config: TrainConfig,
    world: World,
    sources: int,
    spikes: SpikeDetector,
) -> StepStats:
    """One update: the loss summed over tokens, divided once by the number of counted tokens of the global batch."""
    lr = optim.lr_at(step, config.optim, config.steps)
    counted = batch.labels != IGNORE if config.loss_divisor == "scored_tokens" else torch.ones_like(batch.labels)
    divisor = world.sum(counted.sum()).clamp(min=1)
    sums = torch.zeros(2, sources, dtype=torch.float64, device=world.device)
    losses = []
    micro_batches = list(batch.micro_batches(config.rows_per_forward))
    for i, micro in enumerate(micro_batches):
        parallel.last_micro_batch(model, i == len(micro_batches) - 1)
        with record_function("forward"):
            loss = model(micro.input_ids, micro.labels, micro.documents)  # (rows,) fp32
        with record_function("backward"):
            (loss.sum() / divisor).backward()
        losses.append(loss.detach())
    losses = torch.cat(losses)
    sums[0].index_add_(0, batch.sources, exact.loss_terms(losses))
    sums[1].index_add_(0, batch.sources, counted.sum(dim=1).double())
    world.sum(sums)
    with record_function("clip"):
        max_norm = optim.max_grad_norm_at(step, config.optim)
        grad_norm = parallel.clip_gradients(model, max_norm, exactly=config.determinism == "world")
    spike = spikes.judge(mean_loss(sums), grad_norm)
    skipped = skip_if_not_finite(optimizer, sums.sum(), grad_norm, spike if config.guards.spike == "skip" else None)
    with record_function("optimizer"):
        optim.set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
    return StepStats(step, lr, sums, grad_norm, skipped, losses, spike)


def pass_over(batch: Batch, step: int, config: TrainConfig, sources: int) -> StepStats:
    """A step whose batch is not used: time goes on, and with it the learning rate and the order of the data, but nothing
    is computed and nothing changed."""
    none = torch.zeros((), device=batch.labels.device)
    sums = torch.zeros(2, sources, dtype=torch.float64, device=none.device)
    losses = torch.full((len(batch.labels),), torch.nan, device=none.device)
    lr = optim.lr_at(step, config.optim, config.steps)
    return StepStats(step, lr, sums, none + torch.nan, none + 1, losses, none, passed_over=True)


def train(config: TrainConfig) -> Iterator[StepStats]:
    """Train to config.steps, from the newest checkpoint of run_dir if there is one; yields after every update.

    After a rewind (guards.spike) the steps since the checkpoint are done and yielded again. Raises ConfigError, DataError,
    CheckpointError, SaveError, NonFiniteError, ReplicaError, PeerError, and Stopped when a signal ended the run after a save.
    """
    allocator.keep_freed_memory()
    allocator.grow_gpu_segments()
    with contextlib.ExitStack() as stack:
        stack.enter_context(peers_named())
        stack.enter_context(exact.determinism(config.determinism))
        left = Path(config.run_dir) / "forensics" / "out-of-memory"
        stack.enter_context(out_of_memory_told(left, config.micro_batch_size, config.parallel.activation_checkpointing))
        signals = stack.enter_context(StopSignals().installed())
        world = stack.enter_context(join_world(config.parallel.replicas))
        going_on = True
        while going_on:
            going_on = False
            try:
                yield from train_from_newest(config, world, signals)
            except Rewind:  # what is to be passed over is on the disk: go on as after a kill
                going_on = True
            gc.collect()  # a sharded model is a web of hooks: it must be gone before the next one is made


def train_from_newest(config: TrainConfig, world: World, signals: StopSignals) -> Iterator[StepStats]:
    """The loop, from the newest checkpoint on. Raises Rewind when it is to be started again."""
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(Run(config, world, signals))
        if run.is_finished:
            return
        model, optimizer = run.build()
        loader = stack.enter_context(contextlib.closing(run.loader()))
        profiler = stack.enter_context(contextlib.closing(run.profiler()))
        stack.enter_context(allocator.garbage_held())

        for step in range(run.last_step + 1, config.steps + 1):
            profiler.before(step)
            batch, waited = run.next_batch(loader)
            if run.agree_to_stop():
                run.save_and_stop(step - 1, model, optimizer)
            if step in run.passed_over:
                stats = pass_over(batch, step, config, len(run.mixture.names))
            else:
                stats = train_step(model, optimizer, batch, step, config, world, len(run.mixture.names), run.spikes)
            run.add(stats, waited)
            run.report(stats, batch, model)
            if config.guards.replica_check_steps and step % config.guards.replica_check_steps == 0:
                run.check_replicas(step, model, optimizer)
            if step == config.steps or config.checkpoint.is_due(step):
                run.save(step, model, optimizer)
            yield stats

        if run.pending_line is not None:  # a signal came during the last evaluation
            run.save_and_stop(config.steps, model, optimizer)
        run.finish()


class Run:
    """All that stands around the loop: the run_dir, the data, the records. Entered once, on every rank."""

    def __init__(self, config: TrainConfig, world: World, signals: StopSignals):
        config.check_world(world.size)
        self.config, self.world, self.signals = config, world, signals
        self.run_dir = Path(config.run_dir)
        self.stack = contextlib.ExitStack()
        self.warned_of_stop = False

    def __enter__(self) -> Run:
        with self.stack:  # whatever was opened before an error is closed again
            self._open()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)

    # ---- before the loop

    def _open(self) -> None:
        config, world, shape = self.config, self.world, self.config.model
        batch_size = config.global_batch_size
        self.mixture = world.together(lambda: Mixture(config.data, config.seed, batch_size, shape.seq_len, shape.vocab_size))
        self.validation = [
            open_source(name, s, shape.vocab_size, self.mixture.eos_id) for name, s in config.data.validation.items()
        ]
        self.tasks = self._open_tasks()
        world.on_main(self._check_ids)
        world.on_main(self._take_run_dir)
        self.folder = world.on_main(lambda: checkpoints.newest(self.run_dir, config.resume == "strict"))
        self.is_branch = self.folder is None and config.resume_from is not None
        if self.is_branch:
            self.folder = world.on_main(lambda: checkpoints.resolve(Path(config.resume_from)))
        self.state = self._resumed_state() if self.folder else {"step": 0}
        self.last_step: int = self.state["step"]
        self.done = self.last_step  # the last step that this process knows to be done
        self.first_step = self.last_step if self.is_branch else 0  # from which the run began
        self.pending_line: dict[str, Any] | None = self.state.get("pending_line")
        if self.is_finished:
            if world.is_main:
                print(f"{self.run_dir} is finished: {self.last_step} of {config.steps} steps; set total_steps higher to go on")
            return
        self._open_records()

    def _open_records(self) -> None:
        config, world = self.config, self.world
        self._open_watchdog()
        resolved = configuration.to_dict(config)
        world.on_main(lambda: replace_file(self.run_dir / "config.yaml", configuration.dump(config).encode()))
        self.attempt = world.on_main(lambda: 1 + attempts(self.run_dir))
        self.interval = Interval(len(self.mixture.names), world.device, self.state.get("interval"))
        self.spikes = SpikeDetector(world.device, self.state.get("spikes"))
        self.rewinds = world.on_main(lambda: rewound(self.run_dir))
        self.passed_over = set(config.guards.skip_steps).union(*(rewind["skipped"] for rewind in self.rewinds))
        self.in_a_row = self.interval.skipped_in_a_row()
        self.unread: list[StepStats] = []  # steps of which nothing has been read from the device yet
        self.bytes_per_token = [s.n_bytes / s.n_tokens if s.n_bytes else None for s in self.mixture.sources]
        self.clock = Clock()
        self.meter, self.energy_before = hardware.open_energy_meter(), self.state.get("energy_kwh") or 0.0
        self.recorder = world.on_main_only(lambda: Recorder(self.run_dir, config.log, resolved, self.last_step))
        self.console = world.on_main_only(lambda: Console(config.run_dir, self.last_step, config.steps))
        self.checkpointer = Checkpointer(self.run_dir, config.checkpoint, world, self._checkpoint_files())
        for closing in (self.recorder, self.console, self.checkpointer):
            if closing is not None:
                self.stack.callback(closing.close)
        how = "branch" if self.is_branch else "resume" if self.folder else "start"
        about = {"attempt": self.attempt, "world_size": world.size, "checkpoint": str(self.folder or ""), "config": resolved}
        self._event(how, self.last_step, **about)

    def _open_watchdog(self) -> None:
        """From here on a rank that is silent or fails is named to the user."""

        def new_folder() -> Path:
            heartbeats = self.run_dir / ".heartbeats"
            shutil.rmtree(heartbeats, ignore_errors=True)  # of a run that was killed
            return heartbeats / uuid.uuid4().hex[:8]

        folder = self.world.on_main(new_folder)
        self.watchdog = Watchdog(self.config.guards.hang_seconds, self.run_dir, folder, self.world.rank, self.world.size)
        self.stack.callback(self.watchdog.close)
        self.stack.enter_context(self.watchdog.last_words())
        self.stack.enter_context(peers_named())

    @property
    def is_finished(self) -> bool:
        return self.last_step >= self.config.steps and self.pending_line is None

    def _open_tasks(self) -> list[TokenizedTask]:
        """The downstream tasks of the evaluation, tokenized. Raises ConfigError and DataError."""
        wanted, shape = self.config.eval, self.config.model
        if not wanted.downstream:
            return []
        named = wanted.tokenizer or next((source.folder for source in self.mixture.sources if source.folder), None)
        if named is None:
            raise ConfigError("eval.tokenizer", "is needed for eval.downstream, as the data are raw token files; name theirs")
        try:
            tokenizer = load_tokenizer(named)
        except ConfigError as problem:
            raise ConfigError("eval.tokenizer", str(problem)) from problem
        if tokenizer.vocab_size > shape.vocab_size:
            raise ConfigError(
                "eval.tokenizer",
                f"{tokenizer.name} has {tokenizer.vocab_size} ids, the model only {shape.vocab_size}; name that of the data",
            )
        try:
            return [load_task(word, tokenizer, shape.seq_len, wanted.downstream_limit) for word in wanted.downstream]
        except ConfigError as problem:
            raise ConfigError("eval.downstream", problem.what) from problem

    def _check_ids(self) -> None:
        """Look at every token once, unless there are too many to wait for; those are checked batch by batch."""
        for source in (*self.mixture.sources, *self.validation):
            if source.n_tokens <= CHECKED_TOKENS:
                check_ids(source, self.config.model.vocab_size)

    def _take_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.stack.enter_context(RunLock(self.run_dir))
        except OSError as problem:
            raise ConfigError("run_dir", f"{self.run_dir} cannot be written: {problem}") from problem

    def _resumed_state(self) -> dict[str, Any]:
        """The state of the checkpoint that is resumed. A branch may change what it likes, a resumed run may not."""
        state = checkpoints.read_state(self.folder)
        if not self.is_branch:
            saved = configuration.read([self.folder / "config.yaml"])
            now = configuration.to_dict(self.config)
            check_changes(saved, now, self.config.allow_changes)
            check_skip_steps(saved, now, state["step"], self.config.allow_changes)
            check_data(state["data"], self.mixture.fingerprint, self.config.allow_changes)
        return state

    def _checkpoint_files(self) -> dict[str, bytes]:
        files = {"config.yaml": configuration.dump(self.config).encode()}
        folders = [source.folder for source in self.mixture.sources if source.folder]
        if folders:
            try:
                files["tokenizer.json"] = (folders[0] / "tokenizer.json").read_bytes()
            except OSError as problem:
                raise DataError(folders[0] / "tokenizer.json", f"cannot be read: {problem}; prepare the data again") from problem
        return files

    def build(self) -> tuple[Transformer, torch.optim.Optimizer]:
        """The model, sharded, and its optimizer: with first weights, or as the checkpoint has them."""
        config, world = self.config, self.world
        with torch.device("meta"):
            model = Transformer(config.model)
        exactly = config.determinism == "world"
        parallel.shard(model, config.parallel, world, config.global_batch_size if exactly else None)
        optimizer = optim.build_optimizer(dict(model.named_parameters()), config.optim, parallel.on_whole, exactly)
        optim.allocate_state(optimizer)
        if self.folder:
            checkpoints.load(self.folder, model, optimizer, world)
        elif config.init_from:
            checkpoints.load_weights(world.on_main(lambda: checkpoints.resolve(Path(config.init_from))), model, world)
        else:
            parallel.init_weights(model, config.seed)
        if self.console is not None:
            self._introduce(sum(p.numel() for p in model.parameters()))
        if self.pending_line is not None:  # a signal interrupted the evaluation of the step that is resumed
            line, self.pending_line = self.pending_line, None
            self._evaluate_and_log(self.last_step, line, model)
        if self.last_step == 0 and 0 in config.checkpoint.save_steps:
            self.save(0, model, optimizer)
        self.clock.restart()
        return model, optimizer

    def _introduce(self, n_parameters: int) -> None:
        config = self.config
        self.console.say(
            f"{config.run_dir} {f'goes on from {self.folder}' if self.folder else 'starts'}: {n_parameters:,} parameters, "
            f"{config.steps:,} steps of {config.tokens_per_step:,} tokens, "
            f"{self.world.size} x {self.world.device.type}, {config.parallel.precision}"
        )
        parts = [f"{name} {epoch:.3g}" for name, epoch in self._epochs(config.steps).items()]
        self.console.say(f"epochs of each source in the whole run: {', '.join(parts)}")

    def _epochs(self, step: int) -> dict[str, float]:
        """How often each source was read through by the end of this step: above 1, its text repeats."""
        visits = self.mixture.order.visits_before(step * self.config.global_batch_size) / self.mixture.sizes
        return dict(zip(self.mixture.names, visits.tolist(), strict=True))

    # ---- in the loop

    def loader(self) -> Loader:
        return Loader(self.mixture, self.world.rank, self.world.size, self.world.device, self.last_step + 1)

    def profiler(self) -> StepProfiler:
        return StepProfiler(self.config.profile, self.run_dir / "profile", self.world.rank)

    def next_batch(self, loader: Loader) -> tuple[Batch | None, float]:
        """This rank's next batch and the seconds waited for it; None when a signal came meanwhile."""
        started = time.perf_counter()
        self.watchdog.beat(self.done, "waits for its batch")
        batch = loader.get(give_up=lambda: self.signals.received)
        self.watchdog.beat(self.done, "in the next step", batch.sample_hash if batch else "")
        return batch, time.perf_counter() - started

    def agree_to_stop(self) -> bool:
        """Whether any rank has got a signal: the same answer on every rank. Raises SaveError on all when a save of one
        has failed meanwhile."""
        failed, received = 1 << 16, self.signals.received
        agreed = self.world.any(failed if self.checkpointer.failed() else received)
        if agreed == failed:
            self.checkpointer.wait()
            agreed = self.world.any(received)
        if agreed and not received:
            self.signals.received = agreed
        return bool(agreed)

    def add(self, stats: StepStats, waited: float) -> None:
        """Count a step; on a GPU, where reading waits for the step, its verdict may be read some steps later."""
        self.done = stats.step
        self.watchdog.beat(stats.step)
        if stats.step % GARBAGE_STEPS == 0:
            gc.collect()
        if self.console is not None:
            self.console.step(stats.step)
        if stats.passed_over:
            self.interval.pass_over(waited)
            return
        clipped = (stats.grad_norm > optim.max_grad_norm_at(stats.step, self.config.optim)).float()
        self.interval.add(stats.sums, stats.skipped, clipped, stats.spike, waited)
        self.unread.append(stats)
        if self.world.device.type in READ_AT_ONCE or len(self.unread) == min(self.config.guards.max_skipped, UNREAD_STEPS):
            self.read_verdicts()

    def read_verdicts(self) -> None:
        """Read which of the steps since the last reading were skipped or spikes: one host sync, the same on all ranks.

        Raises NonFiniteError when too many in a row were skipped or a spike is to stop the run, and Rewind.
        """
        steps, self.unread = self.unread, []
        flags = torch.stack([torch.stack((stats.skipped, stats.spike)) for stats in steps]).tolist() if steps else []
        for stats, (skipped, spike) in zip(steps, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped or spike:
                self._tell_bad_step(stats, bool(spike))
            if skipped:
                check_skipped(self.in_a_row, self.config.guards, checkpoints.newest_folder(self.run_dir))
            elif spike and self.config.guards.spike != "record":
                self._leave_spike(stats)

    def _tell_bad_step(self, stats: StepStats, spike: bool) -> None:
        about = {"loss": stats.loss.item(), "grad_norm": stats.grad_norm.item(), "learning_rate": stats.lr}
        self._event("spike" if spike else "skip", stats.step, **about)

    def _leave_spike(self, stats: StepStats) -> None:
        """Raises NonFiniteError or Rewind: no state after this step is ever saved."""
        self.checkpointer.wait()
        step, config = stats.step, self.config.guards
        folders = self.world.on_main(lambda: checkpoints.committed(self.run_dir))
        if config.spike == "stop":
            raise NonFiniteError(
                "guards.spike",
                f"step {step} is a spike, its loss {stats.loss.item():.4g} or gradient norm {stats.grad_norm.item():.4g} is far "
                f"above those before; {name_checkpoint(next(reversed(folders.values()), None))}; run again with "
                f"guards.skip_steps=[{step}] to pass over its batch, or with guards.spike=record",
            )
        rewind = plan_rewind(step, next(reversed(folders), self.first_step), self.rewinds, config)
        self._event("rewind", step, **rewind)
        if self.recorder is not None:
            self.recorder.sync()  # before anything goes on: a run killed from here on passes over the same steps
            self.console.say(
                f"step {step} is a spike (loss {stats.loss.item():.4g}, gradient norm {stats.grad_norm.item():.4g}): "
                f"back to step {rewind['to']}, and passing over step{'s' * (len(rewind['skipped']) > 1)} "
                f"{', '.join(map(str, rewind['skipped']))}"
            )
        self.world.barrier()
        raise Rewind

    def report(self, stats: StepStats, batch: Batch, model: Transformer) -> None:
        """Log and evaluate where this step is due for it: one line of metrics at most."""
        config, step = self.config, stats.step
        last = step == config.steps
        is_logged = last or step % config.log.interval_steps == 0
        is_evaluated = bool(self.validation or self.tasks) and (last or step % config.eval.interval_steps == 0)
        if is_logged or is_evaluated:
            self.read_verdicts()
        line = self.train_metrics(stats, batch) if is_logged else {}
        if is_evaluated:
            line = line or self._about(batch) | {"skipped": int(stats.skipped.item())}
            self._evaluate_and_log(step, line, model)
        elif line:
            self._log(step, line)

    def train_metrics(self, stats: StepStats, batch: Batch) -> dict[str, Any]:
        """The metrics of the interval that ends with this step; begins the next interval."""
        config, world, device = self.config, self.world, hardware.detect()
        metrics = self.interval.metrics(self.mixture.names, self.bytes_per_token)
        metrics |= {"optim/total_grad_norm": stats.grad_norm.item(), "optim/learning_rate_group0": stats.lr}
        metrics |= throughput_metrics(
            step=stats.step,
            steps=self.interval.timed_steps,
            seconds=self.clock.seconds,
            data_wait=self.interval.data_wait,
            tokens_per_step=config.tokens_per_step,
            flops_per_token=flops_per_token(config.model),
            world_size=world.size,
            peak_flops=device.peak_flops if device else None,
        )
        metrics |= {f"train/source/{name}/epoch": epoch for name, epoch in self._epochs(stats.step).items()}
        metrics |= self.checkpointer.take_figures()
        self._warn_when_too_slow_to_stop(metrics)
        if world.device.type == "cuda":
            metrics["System/Peak GPU Memory (MB)"] = torch.cuda.max_memory_allocated() / 2**20
        if (energy := self._energy_kwh()) is not None:
            metrics["throughput/energy_kwh"] = energy
        self.interval.restart()
        self.clock.restart()
        return metrics | self._about(batch)

    def _warn_when_too_slow_to_stop(self, metrics: dict[str, Any]) -> None:
        save_seconds = metrics.get("throughput/checkpoint_write_seconds")
        if save_seconds is not None and self.world.is_main and not self.warned_of_stop:
            warning = too_slow_to_stop(metrics["throughput/step_seconds"], save_seconds)
            self.warned_of_stop = warning is not None
            if warning:
                log.warning(warning)

    def _energy_kwh(self) -> float | None:
        """What all GPUs have used for the steps so far, those before a resume too; None where one cannot tell."""
        used = math.nan if self.meter is None else self.meter.kwh()
        total = self.world.sum(torch.tensor(used, dtype=torch.float64, device=self.world.device)).item()
        return None if math.isnan(total) else self.energy_before + total

    def _about(self, batch: Batch) -> dict[str, Any]:
        """What each line tells of where it comes from."""
        return {"sample_hash": batch.sample_hash, "attempt": self.attempt, "world_size": self.world.size}

    def _evaluate_and_log(self, step: int, line: dict[str, Any], model: Transformer) -> None:
        metrics = self.evaluate(model, step)
        parallel.reshard(model)  # a save may follow
        if metrics is None:
            self.pending_line = line  # goes into the checkpoint; the resumed run evaluates this step and logs it
        else:
            self._event("evaluation", step)
            self._log(step, line | metrics)

    def evaluate(self, model: Transformer, step: int) -> dict[str, float] | None:
        """Loss on each validation source and results of each task; None when a signal came in between."""
        metrics = {}
        with self.clock.paused():
            for source in self.validation:
                sums = self.world.sum(loss_sums(model, self._validation_batches(source, step), self.agree_to_stop))
                if self.agree_to_stop():
                    return None
                loss, tokens = sums.tolist()
                # A source's n_bytes are the text of all its tokens, all of which but the first are scored.
                metrics |= loss_metrics(f"eval/{source.name}", loss, tokens, source.n_bytes)
            for task in self.tasks:
                scores = self.world.sum(self._scores(task, model, step))
                if self.agree_to_stop():
                    return None
                metrics |= results_of(task, scores.tolist()).metrics()
        return metrics

    def _scores(self, task: TokenizedTask, model: Transformer, step: int) -> Tensor:
        """This rank's log-likelihoods of the choices of a task, see `score`."""

        def watch(batches: Iterable, *_: object) -> Iterator:
            for batch in batches:
                self.watchdog.beat(step, "evaluates")
                yield batch

        batch_tokens = self.config.micro_batch_size * self.config.model.seq_len
        return score(model, task, batch_tokens, self.world.rank, self.world.size, self.agree_to_stop, watch)

    def _validation_batches(self, source: TokenSource, step: int) -> Iterator[Batch]:
        config, world = self.config, self.world
        rows, seq_len = config.rows_per_forward, config.model.seq_len
        for batch in validation_batches(source, seq_len, rows, world.rank, world.size, self.mixture.eos_id):
            self.watchdog.beat(step, "evaluates")
            yield batch

    def _log(self, step: int, line: dict[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.log(step, line)
            self.recorder.settle(self.checkpointer.committed_step)
            self.console.log(step, line)

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Save the state after this step; the metrics so far are on the disk before it."""
        self.read_verdicts()  # a state after a spike that is to be left is not saved
        with self.clock.paused(), self.watchdog.patient("saves"):
            self.check_replicas(step, model, optimizer)
            if self.recorder is not None:
                self.recorder.sync()
            state = {
                "format": 1,
                "attempt": self.attempt,
                "world_size": self.world.size,
                "data": self.mixture.fingerprint,
                "total_tokens": step * self.config.tokens_per_step,
                "interval": self.interval.state(),
                "spikes": self.spikes.state(),
                "pending_line": self.pending_line,
                "energy_kwh": self._energy_kwh(),
            }
            stall = self.checkpointer.save(step, model, optimizer, state)
        self._event("save", step, stall_seconds=stall)

    def check_replicas(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Raises ReplicaError, on every rank alike, when ranks that must hold the same bits do not."""
        updates = torch.stack([state["step"] for state in optimizer.state.values()])
        tensors, alike = checkpoints.state_tensors(model, optimizer), {"the optimizer's count of updates": updates}
        if found := divergence(tensors, alike, self.world, self.config.parallel.replicas):
            self._settle()
            kept = name_checkpoint(checkpoints.newest_folder(self.run_dir))
            raise ReplicaError(
                "guards.replica_check_steps",
                f"after step {step} {found}; this state is not saved, and {kept}; "
                "run the same command again, without that device if it happens twice",
            )

    def save_and_stop(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Raises Stopped when the state after this step is committed."""
        self._event("signal", step, signal=self.signals.received)
        if self.checkpointer.last_step != step or self.pending_line is not None:
            self.save(step, model, optimizer)
        self._settle()
        name = signal.Signals(self.signals.received).name
        raise Stopped(name, f"stopped after step {step} of {self.config.steps} and saved; run the same command again to go on")

    def finish(self) -> None:
        self._settle()
        self._event("finish", self.config.steps)
        if self.recorder is not None and self.config.log.wandb.artifacts:
            self.recorder.attach(self._summary_files, self.config.steps)

    def _settle(self) -> None:
        with self.watchdog.patient("saves"):
            self.checkpointer.wait()
        if self.recorder is not None:
            self.recorder.settle(self.checkpointer.committed_step)

    def _summary_files(self) -> list[Path]:
        """The page of curves and the list of checkpoints, written into the run_dir."""
        from olmo_train.curves import page, panels  # heavy, and needed here only
        from olmo_train.curves.history import read_run

        run = read_run(self.run_dir)
        curves, listing = self.run_dir / "curves.html", self.run_dir / "checkpoints.txt"
        curves.write_text(page.page_text([run], panels.choose([run], []), page.Look(panels.axis_of([run], "step"))))
        listing.write_text("".join(f"{folder}\n" for folder in checkpoints.committed(self.run_dir).values()))
        return [curves, listing]

    def _event(self, event: str, step: int, **details: Any) -> None:
        if self.recorder is not None:
            self.recorder.event(event, step, **details)

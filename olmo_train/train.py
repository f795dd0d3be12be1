"""The training step and the training loop.

    for stats in train(config): ...

`train` yields after every update, before the step is logged and saved, so custom behaviour goes into the body of this loop; the
command line has an empty body. Calling `train` again resumes from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator

import torch
from torch.profiler import record_function

from olmo_train.data.loader import IGNORE, Batch
from olmo_train.guards.nonfinite import skip_if_not_finite
from olmo_train.guards.rewind import Rewind
from olmo_train.guards.signals import StopSignals
from olmo_train.guards.spikes import SpikeDetector
from olmo_train.guards.watchdog import group_timeout
from olmo_train.log.interval import StepStats, has_no_scored_token, mean_loss
from olmo_train.log.profiling import step_profiler
from olmo_train.model.transformer import Transformer
from olmo_train.optim import schedules
from olmo_train.optim.build import set_lr
from olmo_train.parallel import gradients
from olmo_train.parallel.determinism import DETERMINISM, loss_terms
from olmo_train.parallel.world import World, explain_lost_peers, join_world
from olmo_train.run import allocator
from olmo_train.run.build import build
from olmo_train.run.open import open_run
from olmo_train.run.out_of_memory import explain_out_of_memory
from olmo_train.train_config import TrainConfig


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    world: World,
    spikes: SpikeDetector,
) -> StepStats:
    """One update: sum the loss over tokens, and divide once by the number of scored tokens in the global batch."""
    determinism = DETERMINISM[config.determinism]
    lr = schedules.lr_at(batch.step, config.optim, config.steps)
    counted = batch.labels != IGNORE
    divisor = world.sum(counted.sum())  # 0: no token of the global batch is scored, and the optimizer skips this step
    if config.loss_divisor == "all_tokens":
        counted = (divisor > 0).expand_as(counted)
        divisor = torch.full_like(divisor, batch.labels.numel() * world.data_size)
    sums = torch.zeros(2, len(config.data.sources), dtype=torch.float64, device=world.device)
    losses = []
    micro_batches = list(batch.micro_batches(determinism.rows_per_forward or config.micro_batch_size))
    for i, micro in enumerate(micro_batches):
        gradients.last_micro_batch(model, i == len(micro_batches) - 1)
        with record_function("forward"):
            loss = model(micro.input_ids, micro.labels, micro.documents)  # (rows,) fp32
        with record_function("backward"):
            (loss.sum() / divisor.clamp(min=1)).backward()
        losses.append(loss.detach())
    losses = torch.cat(losses)
    sums[0].index_add_(0, batch.sources, loss_terms(losses))
    sums[1].index_add_(0, batch.sources, counted.sum(dim=1).double())
    world.sum(sums)
    with record_function("clip"):
        max_norm = schedules.max_grad_norm_at(batch.step, config.optim)
        grad_norm, norms = gradients.clip_gradients(model, max_norm, norm_function=determinism.norm_function)
    spike = spikes.judge(mean_loss(sums), grad_norm)
    unscored = has_no_scored_token(sums)
    unwanted = torch.maximum(spike, unscored) if config.guards.spike == "skip" else unscored
    skipped = skip_if_not_finite(optimizer, sums.sum(), grad_norm, unwanted)
    with record_function("optimizer"):
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
    return StepStats(batch.step, lr, sums, grad_norm, skipped, losses, spike, norms=norms)


def pass_over(batch: Batch, config: TrainConfig) -> StepStats:
    """A step that is passed over: it uses up its number, learning rate and batch, but computes and changes nothing."""
    none = torch.zeros((), device=batch.labels.device)
    sums = torch.zeros(2, len(config.data.sources), dtype=torch.float64, device=none.device)
    losses = torch.full((len(batch.labels),), torch.nan, device=none.device)
    lr = schedules.lr_at(batch.step, config.optim, config.steps)
    return StepStats(batch.step, lr, sums, none + torch.nan, none + 1, losses, none, passed_over=True)


def train(config: TrainConfig, world: World | None = None) -> Generator[StepStats, None, None]:
    """Train to config.steps, from the newest checkpoint of run_dir if there is one; yields after every update.

    A step is logged, evaluated and saved when the loop asks for the next one or leaves, so that `stats.log` can add to its line.

    `world`: the processes that train, for a caller that has joined them already; else they are joined here and left at the end.

    After a rewind (guards.spike) the steps since the checkpoint are computed and yielded again. Raises ConfigError, DataError,
    CheckpointError, SaveError, NonFiniteError, ReplicaError, PeerError, and Stopped when a signal ended the run after a save.
    """
    allocator.keep_freed_memory()
    allocator.grow_gpu_segments()
    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_lost_peers())
        stack.enter_context(DETERMINISM[config.determinism].prepare())
        signals = stack.enter_context(StopSignals().installed())
        if world is None:
            world = stack.enter_context(join_world(config.parallel.replicas, group_timeout(config.guards.hang_seconds)))
        rewound = True
        while rewound:
            with contextlib.suppress(Rewind):  # events.jsonl has the steps to pass over: resume as after a kill
                yield from train_from_newest(config, world, signals)
                rewound = False
            gc.collect()  # hooks make reference cycles in a sharded model: free it before the next one is built


def train_from_newest(config: TrainConfig, world: World, signals: StopSignals) -> Generator[StepStats, None, None]:
    """The loop, from the newest checkpoint on. Raises Rewind to be called again."""
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(open_run(config, world, signals))
        if run is None:  # finished
            return
        config = run.config  # with total_steps set
        report = run.run_dir / "forensics" / "out-of-memory"
        stack.enter_context(explain_out_of_memory(report, config.micro_batch_size, config.parallel.activation_checkpointing))
        model, optimizer = build(config, world, run.start.folder, run.start.init_folder)
        run.begin(model, optimizer)
        loader = stack.enter_context(contextlib.closing(run.loader()))
        profiler = stack.enter_context(step_profiler(config.profile, run.run_dir / "profile", world.rank, run.start.step + 1))
        stack.enter_context(allocator.no_automatic_gc())

        for step in run.steps():  # up to config.steps, unless eval.stop_after ends the run
            is_last = step == config.steps
            batch = run.next_batch(loader)
            if run.agree_to_stop():
                run.save_and_stop(step - 1, model, optimizer)

            if step in run.anomalies.passed_over:
                stats = pass_over(batch, config)
            else:
                stats = train_step(model, optimizer, batch, config, world, run.spikes)
            run.add(stats)
            leave = False
            try:
                yield stats
            except GeneratorExit:  # the caller's loop ends here: finish this step first
                leave = True

            is_logged = is_last or step % config.log.interval_steps == 0
            is_evaluated = run.evaluation.is_due(step, is_last)
            if is_logged or is_evaluated:
                run.anomalies.read()
            line = run.journal.line(stats, batch) | run.checkpointer.take_figures() if is_logged else {}
            if own := stats.own.close():
                line = (line or run.journal.brief_line(stats, batch)) | own
            if is_evaluated:
                line = run.evaluate(step, line or run.journal.brief_line(stats, batch), model)
            run.log(step, line)
            if config.guards.replica_check_steps and step % config.guards.replica_check_steps == 0:
                run.check_replicas(step, model, optimizer)
            if is_last or config.checkpoint.is_due(step) or run.evaluation.best.is_kept(step):
                run.save(step, model, optimizer)
            if profiler:
                profiler.step()
            if leave:
                return

        if run.pending_line is not None:  # a signal came during the last evaluation
            run.save_and_stop(config.steps, model, optimizer)
        run.finish()

"""Open a run: its data, its run_dir, the checkpoint to start from, its log and guards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from olmo_train import config as configuration
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.save import Checkpointer
from olmo_train.checkpoint.verify import with_all_ranks
from olmo_train.data.meta import PREPARE_AGAIN
from olmo_train.data.mixture import Mixture
from olmo_train.data.shards import check_ids
from olmo_train.data.tokenizer import CONFIG_FILE, config_file, record_of_folder
from olmo_train.deal import deal
from olmo_train.errors import ConfigError, DataError, reason
from olmo_train.eval.during_run import Evaluation
from olmo_train.formats import counted
from olmo_train.guards.anomalies import AnomalyGuard
from olmo_train.guards.forensics import Forensics
from olmo_train.guards.heartbeats import new_heartbeats
from olmo_train.guards.signals import StopSignals
from olmo_train.guards.spikes import SpikeDetector
from olmo_train.guards.watchdog import Watchdog
from olmo_train.history import History
from olmo_train.log.journal import Journal
from olmo_train.log.run_logger import RunLogger
from olmo_train.parallel import choices, kernels
from olmo_train.parallel.config import CpuKernels
from olmo_train.parallel.processes import processes_on_machine
from olmo_train.parallel.world import World, explain_lost_peers
from olmo_train.plan import preflight
from olmo_train.run.run import Run
from olmo_train.run.start import Found, Start, find_checkpoint, owed_line, read_start
from olmo_train.storage import lock_run_dir, replace_file
from olmo_train.train_config import TrainConfig, schedule_warnings

log = logging.getLogger(__name__)
CHECKED_TOKENS = 10**9  # a source of at most N tokens is checked completely before the first step, in seconds


@contextlib.contextmanager
def open_run(config: TrainConfig, world: World, signals: StopSignals) -> Iterator[Run | None]:
    """The run of a configuration, on every rank; None if it is finished. Raises ConfigError, DataError and CheckpointError."""
    run_dir = Path(config.run_dir)
    if not config.batch_is_unset:  # of a run that has begun, earlier batches need not be divided
        config.check_world(world.data_size, math.inf if config.resume_from or run_dir.exists() else 0)
    with contextlib.ExitStack() as stack:
        mixture, evaluation = _open_data(config, world)
        is_new = world.on_main(lambda: not run_dir.exists())
        if is_new:  # a refused run leaves no run_dir
            memory = _check_memory(_decided(config, mixture, world)[0], world)
        world.on_main(lambda: stack.enter_context(_locked(run_dir)))
        watchdog = _start_watchdog(config, world, stack)
        with watchdog.patient("verifies checkpoints"):
            found = with_all_ranks(world, functools.partial(find_checkpoint, config))
        config, decisions = _decided(config, mixture, world, found)
        config, start = world.together(lambda: read_start(config, mixture, found))
        config.check_world(world.data_size, start.step)
        resolved, notes = configuration.to_dict(config), config.batch_notes(world.data_size) + decisions
        mixture.set_batches(start.batches)
        micro_batch_size = config.micro_batch_on(world.data_size)
        config = config.with_length(mixture).in_steps(start.batches)
        config = dataclasses.replace(config, micro_batch_size=micro_batch_size)
        pending_line = world.on_main(lambda: owed_line(run_dir, start))
        evaluation.recall(run_dir, start.step)
        if (start.step >= config.steps or evaluation.best.ends_run) and pending_line is None:
            if world.is_main:
                print(_why_done(config, start, evaluation))
            yield None
            return
        world.on_main(lambda: _check_checkpoint_tokenizer(mixture, start))
        if not is_new:  # only now, as a finished run has nothing to compute
            memory = _check_memory(config, world)
        notes.append(f"memory: needs about {memory}")
        config = _with_cpu_kernels(config, world, start)

        text = configuration.dump(resolved, os.getcwd()).encode()
        world.on_main(lambda: replace_file(run_dir / "config.yaml", text))
        attempt = world.on_main(lambda: 1 + len(History(run_dir).starts))
        logger = stack.enter_context(contextlib.closing(RunLogger(config, world, start.step, resolved)))
        journal = Journal(config, world, mixture, logger, attempt, start.state)
        files = world.on_main_only(lambda: _checkpoint_files(text, mixture)) or {}  # rank 0 alone writes them
        resumed_step = start.step if start.kind == "resume" else None
        checkpointer = Checkpointer(run_dir, config.checkpoint, world, files, resumed_step)
        stack.enter_context(contextlib.closing(checkpointer))
        forensics = Forensics(run_dir, mixture, world, attempt, watchdog)
        anomalies = AnomalyGuard(config, world, logger, checkpointer, forensics, start.first_step, start.skipped_in_a_row)
        spikes = SpikeDetector(world.device, start.state.get("spikes"))
        for note in notes:
            logger.say(note)
        _log_attempt(config, world, logger, start, mixture, {"attempt": attempt, "config": resolved})
        stack.enter_context(watchdog.exit_report())  # before logs are closed and a save is awaited
        stack.enter_context(explain_lost_peers())
        yield Run(
            config, world, signals, start, mixture, evaluation, watchdog, logger, journal, checkpointer, anomalies, spikes,
            pending_line,
        )  # fmt: skip


def _decided(config: TrainConfig, mixture: Mixture, world: World, found: Found | None = None) -> tuple[TrainConfig, list[str]]:
    """The configuration with what `parallel` leaves open as rank 0 chooses it, and lines about that. A resumed run keeps what its
    checkpoint records. `found`: None before it is known what the run starts from."""
    on_gpu, cores = world.device.type == "cuda", torch.get_num_threads() * world.size

    def in_steps(chosen: TrainConfig) -> TrainConfig:
        return chosen.with_length(mixture).in_steps()

    def choose() -> tuple[TrainConfig, list[str]]:
        saved, done = None, 0
        if found and found.folder:
            recorded = configuration.decoded(configuration.read([found.folder / "config.yaml"]))
            done = folders.read_state(found.folder)["step"]
            saved = recorded.get("parallel", {}) if found.kind == "resume" else None
        return choices.decide(config, on_gpu, cores, choices.missing_by_trial, in_steps, saved, done)

    decided, notes = world.on_main(choose)
    return choices.with_parallel(config, decided.parallel), notes


def _check_memory(config: TrainConfig, world: World) -> preflight.Memory:
    """The memory of the run. Raises ConfigError on every rank where it does not fit."""
    memory = preflight.memory_of(config, world.size, processes_on_machine(world.size), world.device_memory())
    world.together(lambda: preflight.check_memory(memory, config))
    return memory


def _with_cpu_kernels(config: TrainConfig, world: World, start: Start) -> TrainConfig:
    """The configuration with parallel.cpu_kernels chosen where it is null and the run is on CPUs: the same on every rank."""
    parallel = config.parallel
    if parallel.cpu_kernels is not None or world.device.type != "cpu":
        return config
    recorded = start.state.get("cpu_kernels") if start.kind == "resume" else None
    if world.any(not kernels.has_cpu_kernels(None, world.device)):
        chosen: CpuKernels = False
    else:
        chosen = world.on_main(lambda: kernels.choose_cpu_kernels(config, recorded))
    return dataclasses.replace(config, parallel=dataclasses.replace(parallel, cpu_kernels=chosen))


def _why_done(config: TrainConfig, start: Start, evaluation: Evaluation) -> str:
    """Why a run has nothing to do, and how to continue it."""
    done, fix = f"is finished: {start.step} of {counted(config.steps, 'step')}", "set total_steps higher"
    if start.step > config.steps:
        done = f"is at step {start.step}, past total_steps {config.steps}"
    elif evaluation.best.ends_run:
        fix = f"{evaluation.best}; set eval.stop_after higher"
    return f"{config.run_dir} {done}; {fix} to continue"


def _open_data(config: TrainConfig, world: World) -> tuple[Mixture, Evaluation]:
    """The training data and what is evaluated. Each rank checks its share of the shards."""
    mixture = world.together(config.mixture)
    evaluation = world.together(lambda: Evaluation(config, world, mixture))
    world.on_main(lambda: mixture.check_tokenizers(evaluation.sources, evaluation.tokenizer))
    # Ids of larger sources are checked batch by batch.
    sources = [source for source in (*mixture.sources, *evaluation.sources) if source.n_tokens <= CHECKED_TOKENS]
    shards = {file: (source, shard) for source in sources for shard, file in enumerate(source.files)}
    owners = deal([source.shard_tokens(shard) for source, shard in shards.values()], world.size)

    def check() -> None:
        for (source, shard), owner in zip(shards.values(), owners, strict=True):
            if owner == world.rank:
                check_ids(source, config.model.vocab_size, [shard])

    world.together(check)
    return mixture, evaluation


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_run_dir(run_dir))
            folders.put_back(run_dir)
        except OSError as problem:
            raise ConfigError("run_dir", f"{run_dir} cannot be written: {problem.strerror}; choose another run_dir") from problem
        yield


def _check_checkpoint_tokenizer(mixture: Mixture, start: Start) -> None:
    """Check that the data have the tokenizer that the initial weights were trained with."""
    folder = start.folder or start.init_folder
    if folder:
        mixture.check_tokenizers((), record_of_folder(folder))


def _start_watchdog(config: TrainConfig, world: World, stack: contextlib.ExitStack) -> Watchdog:
    """Start the watchdog: from here on, errors name the rank that failed or hangs."""
    run_dir = Path(config.run_dir)
    heartbeats = world.on_main(lambda: new_heartbeats(run_dir))
    watchdog = world.together(lambda: Watchdog(config.guards.hang_seconds, run_dir, heartbeats, world.rank, world.size))
    stack.callback(watchdog.close)
    stack.enter_context(watchdog.exit_report())
    stack.enter_context(explain_lost_peers())
    return watchdog


def _checkpoint_files(config_yaml: bytes, mixture: Mixture) -> dict[str, bytes]:
    """{name: contents} of the files that every checkpoint has a copy of: the configuration, and the tokenizer of the data."""
    files = {"config.yaml": config_yaml}
    sources = [source for source in mixture.sources if source.folder]
    prepared = next((source for source in sources if source.meta.template), sources[0] if sources else None)
    if prepared:
        file = prepared.folder / "tokenizer.json"
        try:
            template = {"template": prepared.meta.template} if prepared.meta.template else {}
            files |= {CONFIG_FILE: config_file(prepared.meta.eos_text, **template), file.name: file.read_bytes()}
        except OSError as problem:
            raise DataError(file, f"cannot be read: {reason(problem)}; {PREPARE_AGAIN}") from problem
    return files


def _log_attempt(
    config: TrainConfig, world: World, logger: RunLogger, start: Start, mixture: Mixture, about: dict[str, Any]
) -> None:
    """Warn about what is probably a mistake, and log the event that begins an attempt."""
    if world.is_main:
        jumps = schedule_warnings(config, start.saved, mixture, start.step) if start.kind == "resume" else ()
        for warning in (*jumps, *preflight.cautions(config, mixture, world.device.type == "cpu")):
            log.warning("%s", warning)
    about |= {"world_size": world.size, "data_size": world.data_size, "checkpoint": str(start.folder or "")}
    about |= {"host": socket.gethostname(), "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"}
    about |= {"batches": start.batches.changes, "total_steps": config.steps, "started_in": os.getcwd()}
    about |= {"cpu_kernels": config.parallel.cpu_kernels}
    logger.event(start.kind, start.step, **about)

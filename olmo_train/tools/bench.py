"""Measure how fast a configuration trains on this machine, with real steps of `train`, including logging, guards and clipping."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo_train import config as configuration
from olmo_train import hardware
from olmo_train import train as training
from olmo_train.formats import counted
from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import flops_convention, flops_per_token
from olmo_train.parallel import processes
from olmo_train.parallel.config import ParallelConfig
from olmo_train.parallel.kernels import describe_attention, is_compiled
from olmo_train.train import train
from olmo_train.train_config import TrainConfig

PHASES = ("forward", "backward", "clip", "optimizer")  # the ranges that train_step names for profilers
PROFILED = 3  # steps timed by phase, after the others
RANDOM_TOKENS = 2_000_000  # of a random source, if the configuration has no data


def load(files: list[str], words: list[str], folder: Path) -> TrainConfig:
    """The configuration to measure, with a temporary run_dir, W&B off, and random tokens if it has no data: speed does not
    depend on the tokens. Of a batch_schedule the largest batch is measured."""
    values = configuration.read(files, words)
    values["run_dir"] = str(folder / "run")
    values.pop("total_epochs", None)
    if not values.get("total_tokens"):  # the length decides whether a run on a CPU is compiled
        values["total_steps"] = values.get("total_steps") or 10**6
    values.setdefault("log", {})["wandb"] = {"mode": "disabled"}
    values["checkpoint"] = {"interval_steps": 10**9}
    values["eval"] = {"interval_steps": 10**9}
    if not values.get("data", {}).get("sources"):
        vocab_size = configuration.build(ModelConfig, values.get("model", {}), "model").vocab_size
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        file = folder / "random.npy"
        np.random.default_rng(0).integers(0, vocab_size, RANDOM_TOKENS).astype(dtype).tofile(file)
        values.setdefault("data", {})["sources"] = {"random": {"path": str(file)}}
    config = configuration.build(TrainConfig, values)
    config = dataclasses.replace(config, total_steps=config.steps, total_tokens=None)
    if not config.batch_schedule:
        return config
    optim = dataclasses.replace(config.optim, lr_batch_scaling="none")
    return dataclasses.replace(config, global_batch_size=max(config.batches.sizes), batch_schedule=(), optim=optim)


def measure(files: list[str], words: list[str], steps: int, warmup: int) -> dict[str, Any]:
    """Train `warmup` steps, then time `steps` steps one by one, then the phases of PROFILED steps.

    Returns plain numbers: medians over steps, so that one slow step does not count.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="olmo-train-bench-") as folder:
        config = load(files, words, Path(folder))
        config = dataclasses.replace(config, total_steps=max(config.steps, warmup + steps + PROFILED + 1))
        run = train(config)
        next(run)
        _finished()
        first_step = time.perf_counter() - started
        for _ in range(warmup - 1):
            next(run)
        _finished()
        seconds = []
        for _ in range(steps):
            before = time.perf_counter()
            next(run)
            _finished()
            seconds.append(time.perf_counter() - before)
        phases = _phases(run)
        run.close()
        config = dataclasses.replace(config, parallel=_parallel_of(config))
    return _figures(config, seconds, phases, first_step)


def _parallel_of(config: TrainConfig) -> ParallelConfig:
    """The `parallel` section that the run chose, from the config.yaml that rank 0 wrote; on other ranks the configured one."""
    file = Path(config.run_dir, "config.yaml")
    if not file.exists():
        return config.parallel
    return configuration.build(ParallelConfig, configuration.read([file])["parallel"], "parallel")


def _figures(config: TrainConfig, seconds: list[float], phases: dict[str, float], first_step: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    rate = config.tokens_per_step / median
    device = hardware.detect()
    flops = flops_per_token(config.model, adapter=config.adapter)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": rate,
        "step_seconds": median,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "phase_seconds": phases,
        "flops_per_token": flops,
        "flops_convention": flops_convention(config.adapter),
        "flops_per_second": rate * flops,
        "peak_flops": device.peak_flops if device else None,
        "mfu": rate * flops / device.peak_flops if device else None,
        "peak_memory_bytes": peak,
        "first_step_seconds": first_step,
        "precision": config.parallel.precision,
        "compiled": is_compiled(config.parallel, torch.device("cuda" if on_gpu else "cpu")),
        "attention": describe_attention(config) if not on_gpu and processes.rank() == 0 else None,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {counted(torch.get_num_threads(), 'thread')}",
    }


class PhaseClock:
    """Takes the place of torch's record_function in train_step, and measures the ranges by the clock of the device."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.spans.append((name, start, self.now()))

    def now(self) -> Any:
        """Seconds on a CPU. On a GPU an event that its stream reaches after all work before it, so that nothing waits."""
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two values of `now`; those of a GPU have to be reached."""
        return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def _phases(run) -> dict[str, float]:
    """Mean seconds of a step in each phase; `other` is the remaining time: data, counting, logging, guards."""
    clock = PhaseClock()
    record_function = training.record_function
    setattr(training, "record_function", clock)  # noqa: B010, a class for type checkers
    try:
        start = clock.now()
        for _ in range(PROFILED):
            next(run)
        end = clock.now()
    finally:
        setattr(training, "record_function", record_function)  # noqa: B010
    _finished()
    spent = dict.fromkeys(PHASES, 0.0)
    for name, begin, over in clock.spans:
        spent[name] += clock.seconds(begin, over) / PROFILED
    return {**spent, "other": clock.seconds(start, end) / PROFILED - sum(spent.values())}


def _finished() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Decide what `parallel.precision: auto` and, on a CPU, `parallel.compile: null` mean for a run on this machine.

Both change the last bits of a step. So a run decides once, on rank 0, config.yaml and the checkpoints record the outcome, and a
resumed run keeps it. Importing this file imports no torch, which a plan for a GPU does not need.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from olmo_train.formats import duration, rounded
from olmo_train.parallel.config import ParallelConfig
from olmo_train.train_config import TrainConfig

log = logging.getLogger(__name__)
# Seconds of one core that compiled blocks save for each token, layer and feature of d_model: the compiler fuses norms, RoPE,
# activations, residuals and casts, whose time hardly depends on how fast a CPU multiplies matrices. docs/benchmarks.md has the
# measurements.
FUSED_SECONDS = 20e-9
COMPILE_SECONDS = 30.0  # that the first step takes longer while the cache of torch.compile is empty, whatever the model
WORTH = 2  # a run must save this many times COMPILE_SECONDS: the estimate is rough, and a run may be stopped early
FAST = 1.3  # bf16 must multiply this many times as fast as fp32: casts cost what a smaller gain would save
ROWS, SIZE, ROUNDS = 256, 512, 5  # of the timed matrix products


def decide(
    config: TrainConfig,
    on_gpu: bool,
    cores: int,
    missing: Callable[[], str | None],
    lasting: Callable[[TrainConfig], TrainConfig],
    saved: Mapping[str, Any] | None = None,
    done: int = 0,
) -> tuple[TrainConfig, list[str]]:
    """The configuration with what `parallel` leaves open, and lines about that. `lasting` returns a configuration with its length
    in steps; it is called only where the length decides. The others are those of choose_precision and choose_compile."""
    parallel, notes = choose_precision(config.parallel, on_gpu, saved)
    config = with_parallel(config, parallel)
    if parallel.compile is not None or on_gpu:
        return config, notes
    compiled, about = choose_compile(config if saved is not None else lasting(config), cores, missing, saved, done)
    return with_parallel(config, replace(parallel, compile=compiled)), notes + about


def choose_precision(
    parallel: ParallelConfig, on_gpu: bool, saved: Mapping[str, Any] | None = None
) -> tuple[ParallelConfig, list[str]]:
    """The section with a precision instead of `auto`, and a line about it. `saved`: the section of the checkpoint that is
    resumed, whose precision is kept."""
    if parallel.precision != "auto":
        return parallel, []
    precision, notes = (saved or {}).get("precision", "auto"), []
    if precision == "auto":
        precision, why = fast_precision(on_gpu)
        notes = [f"parallel.precision auto is {precision}: {why}"]
    return replace(parallel, precision=precision), notes


def choose_compile(
    config: TrainConfig,
    cores: int,
    missing: Callable[[], str | None],
    saved: Mapping[str, Any] | None = None,
    done: int = 0,
) -> tuple[bool, list[str]]:
    """Whether `parallel.compile: null` compiles a run on a CPU, and a line about it.

    `config`: with its length in steps unless a run is resumed. `cores`: threads of all processes. `missing`
    returns what torch.compile lacks here; it is called only if compiling would pay. `saved`: the `parallel` section of the
    checkpoint that is resumed, whose choice is kept. `done`: the steps of the parent of a branch.
    """
    if saved is not None:  # null is recorded by a run on a GPU, and by versions that did not compile on a CPU
        lacks = missing() if saved.get("compile") else None
        return bool(saved.get("compile")) and not lacks, [f"no longer compiled: torch.compile needs {lacks}"] if lacks else []
    saving = seconds_saved(config, cores, done)
    pays = saving >= WORTH * COMPILE_SECONDS
    if pays and missing():
        return False, []
    about = f"{'saves' if pays else 'would save'} about {duration(rounded(saving))} of this run"
    return pays, [f"{'' if pays else 'not '}compiled: torch.compile {about}, and takes about {COMPILE_SECONDS:.0f} s"]


def with_parallel(config: TrainConfig, parallel: ParallelConfig) -> TrainConfig:
    """The configuration with another `parallel` section. A global batch size that it does not set stays unset."""
    return replace(config, parallel=parallel, **({"global_batch_size": None} if config.batch_is_unset else {}))


def as_decided(config: TrainConfig, run: TrainConfig) -> TrainConfig:
    """The configuration with what its `parallel` section leaves open as a run has recorded it."""
    parallel, recorded = config.parallel, run.parallel
    precision = recorded.precision if parallel.precision == "auto" else parallel.precision
    compiled = recorded.compile if parallel.compile is None else parallel.compile
    return with_parallel(config, replace(parallel, precision=precision, compile=compiled))


def seconds_saved(config: TrainConfig, cores: int, done: int = 0) -> float:
    """Seconds that compiled blocks save on a CPU in the steps after `done`, by FUSED_SECONDS."""
    tokens = config.tokens_by(config.steps) - config.tokens_by(min(done, config.steps))
    seconds = FUSED_SECONDS * config.model.n_layers * config.model.d_model
    return seconds * tokens / cores


@functools.cache
def fast_precision(on_gpu: bool) -> tuple[str, str]:
    """The precision that `auto` means on this device, and why. A CPU is measured, in about a tenth of a second: names and flags
    do not say how well a library uses its instructions."""
    import torch

    if on_gpu:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has units for bf16"
        return "fp32", "this GPU has no units for bf16"
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    matrices = {dtype: (torch.ones(ROWS, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)) for dtype in seconds}
    with torch.no_grad():
        for _ in range(ROUNDS):  # in turn, so that both are timed under the same load
            for dtype, (x, weight) in matrices.items():
                started = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    faster = seconds[torch.float32] / seconds[torch.bfloat16]
    why = f"this CPU multiplies matrices in bf16 {faster:.2g} times as fast as in fp32"
    return "bf16" if faster >= FAST else "fp32", why


@functools.cache
def missing_by_trial() -> str | None:
    """What torch.compile lacks to build kernels for this CPU, found out by compiling one line; None if nothing. It takes some
    seconds the first time, less from the cache."""
    import torch

    from olmo_train.parallel.kernels import missing_for_compile

    if missing := missing_for_compile(on_gpu=False):
        return missing
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(64))
    except Exception as problem:  # a compiler that fails, a folder from which nothing may be run, ...
        said = str(problem).strip().splitlines() or [type(problem).__name__]
        log.warning("parallel.compile: torch.compile fails on this machine, so the run is not compiled: %s", said[0])
        return "a working compiler"
    return None

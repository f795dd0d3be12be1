"""What a run reports before its first step, and what it refuses: `train`, `doctor` and `plan` use the same code.

Imports no torch; the caller passes what the device is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

from olmo_train.data.mixture import Mixture
from olmo_train.errors import ConfigError
from olmo_train.formats import byte_size, counted
from olmo_train.hardware import available_memory, computes_bf16
from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import count_parameters
from olmo_train.optim.schedules import lr_at
from olmo_train.parallel.config import Checkpointing
from olmo_train.plan import memory
from olmo_train.plan.memory import Layout, memory_estimate
from olmo_train.train_config import TrainConfig

log = logging.getLogger(__name__)
PROCESS_BYTES = 400_000_000  # resident memory of a process on a CPU besides its tensors: torch's libraries, Python
MOST_EPOCHS = 4  # Muennighoff et al. 2023: up to 4 epochs, repeated data are nearly as good as new data
MARGIN = 0.9  # estimates are within a tenth of a real step, so a run is refused only if 90% of its estimate does not fit


@dataclass(frozen=True)
class Memory:
    """The memory that a run needs beside the memory that there is, in bytes: of one GPU, or of this machine on a CPU."""

    needed: int
    # of this, what it needs in any case; less than `needed` only for a compiled run, which takes less than its estimate
    least: int
    available: int | None  # None: unknown
    place: str  # "this machine" or "each GPU"
    key: str = ""  # the configuration key that a run which does not fit should change
    fix: str = ""  # what would make it fit

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.needed <= self.available

    def __str__(self) -> str:
        beside = "" if self.available is None else f" of {byte_size(self.available)} available"
        return f"{byte_size(self.needed)}{beside} on {self.place}"


def layout_of(config: TrainConfig, processes: int) -> Layout:
    """How a step of this run is distributed over the processes."""
    parallel, micro_batch_size = config.parallel, config.micro_batch_on(processes)
    return Layout(
        gpus=processes,
        replicas=parallel.replicas,
        shard=parallel.shard,
        precision=parallel.precision,
        reduce_dtype=parallel.reduce_dtype,
        activation_checkpointing=parallel.activation_checkpointing,
        micro_batch_size=micro_batch_size,
        micro_batches=max(config.batches.sizes) // (processes * micro_batch_size),
        optimizer=config.optim.name,
        adapter=config.adapter,
    )


def memory_of(config: TrainConfig, processes: int, on_machine: int, gpu_bytes: int | None = None) -> Memory:
    """The memory of a run on `processes` processes, of which `on_machine` share this machine.

    `gpu_bytes`: the memory of a GPU; None on CPUs, where a process also keeps the copy of its state that a checkpoint is
    written from.
    """
    layout = layout_of(config, processes)

    def besides(model: ModelConfig) -> int:
        """Bytes of a process on a CPU besides those of the estimate."""
        return PROCESS_BYTES + memory.checkpoint_bytes(model, layout.optimizer, layout.adapter) // processes

    def budget(model: ModelConfig) -> int:
        """What a process may use, with the runtime of a GPU, which `fits` adds."""
        return gpu_bytes or (available or 0) // on_machine - besides(model) + memory.RUNTIME_BYTES

    def needed(layout: Layout) -> int:
        peak = memory_estimate(config.model, layout).peak
        return peak + memory.RUNTIME_BYTES if gpu_bytes else on_machine * (peak + besides(config.model))

    compiled = config.parallel.is_compiled(gpu_bytes is not None)
    least = needed(replace(layout, activation_checkpointing="full") if compiled else layout)
    available, place = (gpu_bytes, "each GPU") if gpu_bytes else (available_memory(), "this machine")
    found = Memory(needed(layout), least, available, place)
    if found.fits is not False:
        return found
    key, fix = _fix(config.model, layout, budget, "more machines" if gpu_bytes is None else "more GPUs")
    return replace(found, key=key, fix=fix)


def _fix(model: ModelConfig, layout: Layout, budget: Callable[[ModelConfig], int], more: str) -> tuple[str, str]:
    """(key, fix): the cheapest change that would make a run fit. `budget`: bytes that a process may use for this model."""
    ways = get_args(Checkpointing)
    for way in ways[ways.index(layout.activation_checkpointing) :]:
        if size := memory.largest_micro_batch(model, replace(layout, activation_checkpointing=way), budget(model)):
            other = "" if way == layout.activation_checkpointing else f" parallel.activation_checkpointing={way}"
            return "micro_batch_size", f"set micro_batch_size={size}{other}"
    smallest = replace(layout, micro_batch_size=1, activation_checkpointing="full")
    fewer = (replace(model, n_layers=n) for n in range(model.n_layers - 1, 0, -1))
    fitting = next((m.n_layers for m in fewer if memory_estimate(m, smallest).fits(budget(m))), None)
    smaller = f"model.n_layers={fitting} would fit" if fitting else "reduce model.d_model and model.mlp_hidden"
    return "model", f"use {more}, or a smaller model: {smaller}"


def check_memory(found: Memory, config: TrainConfig) -> None:
    """Raises ConfigError when the run cannot fit, and warns when it may not."""
    if found.fits is not False:
        return
    if MARGIN * found.least > (found.available or 0):
        raise does_not_fit(found, config)
    log.warning("the run may run out of memory: it needs about %s; %s", found, found.fix)


def does_not_fit(found: Memory, config: TrainConfig) -> ConfigError:
    """The error of a run that does not fit, with the key to change."""
    state = byte_size(memory.state_bytes(config.model, config.optim.name, config.adapter, config.parallel.precision))
    parameters = count_parameters(config.model).total
    what = (
        f"{parameters:,} parameters, whose weights, gradients and optimizer state take {state}; " if found.key == "model" else ""
    )
    return ConfigError(found.key, f"the run does not fit: {what}it needs {found}; {found.fix}")


def facts(config: TrainConfig, mixture: Mixture) -> list[str]:
    """A run in two lines: epochs of each source, and the share of the warmup."""
    epochs = ", ".join(f"{name} {epoch:.3g}" for name, epoch in mixture.epochs(config.steps).items())
    warmup, steps = config.optim.warmup_steps, counted(config.steps, "step")
    return [
        f"epochs of each source over the run:  {epochs}",
        f"warmup {warmup:,} of {steps} ({warmup / config.steps:.0%}), peak learning rate {config.optim.peak_lr:g}",
    ]


@dataclass(frozen=True)
class Caution:
    """Something in a configuration or its data that is probably a mistake."""

    about: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def cautions(config: TrainConfig, mixture: Mixture | None, on_cpu: bool) -> Iterator[Caution]:
    """What is probably a mistake in a configuration, and in its data if they are open."""
    yield from _rate_cautions(config)
    if on_cpu and config.parallel.precision == "bf16" and computes_bf16() is False:
        what = "parallel.precision is bf16, which this processor computes several times more slowly than fp32"
        yield Caution("precision", what, "set parallel.precision=fp32, or auto")
    if mixture:
        countable = 2**60 // max(config.batches.sizes)  # places of a longer run do not fit an int64
        for name, epochs in mixture.epochs(min(config.steps, countable)).items():
            if epochs > MOST_EPOCHS:
                what = f"data.sources.{name} is read {epochs:.3g} times in the run"
                remedy = f"more than {MOST_EPOCHS} epochs teach little (Muennighoff et al. 2023): "
                yield Caution(f"data {name}", what, remedy + "add data, lower its weight, or train for fewer steps")
        yield from _vocabulary_cautions(config, mixture)


def _rate_cautions(config: TrainConfig) -> Iterator[Caution]:
    """Of a warmup that fills the run, which is an error with total_tokens, and of a schedule that ends before its warmup."""
    optim, last = config.optim, config.steps
    if optim.warmup_steps >= last:
        what, remedy = config.warmup_too_long
        yield Caution("warmup", f"optim.warmup_steps {what}", remedy)
        return
    highest = max(lr_at(step, optim, last) for step in {max(optim.warmup_steps - 1, 1), max(optim.warmup_steps, 1)})
    if highest < 0.9 * optim.peak_lr:  # a schedule without a warmup begins a step below its peak
        what = (
            f"the learning rate never reaches optim.peak_lr {optim.peak_lr:g}: it is at most {highest:.3g}, since the schedule "
            f"ends at step {optim.schedule_steps or last}, and the warmup at step {optim.warmup_steps}"
        )
        yield Caution("warmup", what, "set fewer optim.warmup_steps, or a later optim.schedule_steps")


def _vocabulary_cautions(config: TrainConfig, mixture: Mixture) -> Iterator[Caution]:
    """Of a vocabulary more than twice as large as that of the data, which only prepared sources record."""
    known = [source.meta.vocab_size if source.meta else None for source in mixture.sources]
    model, used = config.model, max(size or 0 for size in known)
    if None in known or model.vocab_size <= 2 * used:
        return
    unused = (model.vocab_rows - used) * model.d_model * (1 if model.tie_embeddings else 2)
    what = (
        f"model.vocab_size is {model.vocab_size:,}, and the tokenizer of the data has {used:,} tokens: {unused:,} of "
        f"{count_parameters(model).total:,} parameters are never used"
    )
    yield Caution("vocabulary", what, f"set model.vocab_size={used} model.padded_vocab_size=null")

"""Put a plan together: the GPU, the data, the memory estimate and the schedule of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, get_args

import numpy as np

from olmo_train.data.mixture import Mixture
from olmo_train.errors import ConfigError, DataError, nearest
from olmo_train.hardware import GPUS, Hardware, detect, lookup
from olmo_train.model.cost import count_parameters, flops_convention, flops_per_token
from olmo_train.optim.schedules import lr_at
from olmo_train.parallel.config import Checkpointing
from olmo_train.plan import memory, preflight, scaling, time
from olmo_train.plan.time import Assumptions
from olmo_train.train_config import TrainConfig

UNNAMED = "(not named)"


def choose_gpu(name: str | None, memory_gb: float | None, tflops: float | None, power_watts: float | None) -> Hardware | None:
    """The named GPU's figures, or this machine's; figures passed here take precedence over the table.

    None when no GPU is named and there is none here. Raises ConfigError when figures are missing.
    """
    given = {"memory_gb": memory_gb, "peak_flops": tflops and tflops * 1e12, "power_watts": power_watts}
    known = lookup(name) if name else None
    if known is None and name is None and not any(given.values()):
        return detect()
    figures = (asdict(known) if known else {}) | {key: value for key, value in given.items() if value}
    if len(figures) < len(given):
        word = (name or "").lower()
        kinds = [key for key in GPUS if word and key.startswith(word)]
        known_ones = f"one of {', '.join(kinds)}" if kinds else f"a known GPU: {nearest(word, GPUS)}"
        what = f"'{name}' has no figures here" if name else "some figures are missing"
        raise ConfigError("--gpu", f"{what}; set --gpu-memory, --gpu-peak and --gpu-power, or {known_ones}")
    return Hardware(**({"name": name or "a GPU of your figures"} | figures))


def open_data(config: TrainConfig) -> tuple[Mixture | None, str | None]:
    """The sources, opened, or the reason why they cannot be; a plan does not need them."""
    if UNNAMED in config.data.sources:
        return None, "no data are named"
    try:
        mixture = config.mixture()
        mixture.check_tokenizers()
        return mixture, None
    except DataError as problem:
        return None, str(problem)


def with_length(config: TrainConfig, mixture: Mixture | None, why_not: str | None) -> TrainConfig:
    """The configuration with its lengths in steps. Raises ConfigError when they follow from data that cannot be opened."""
    if mixture is not None:
        return config.with_length(mixture).in_steps()
    if config.total_epochs is not None:
        raise ConfigError("total_epochs", f"{config.total_epochs:g} is a length that needs the data: {why_not}; set total_steps")
    return config.in_steps()


def make_plan(
    config: TrainConfig,
    gpus: int,
    gpu: Hardware | None,
    mixture: Mixture | None,
    why_not: str | None,
    found: preflight.Memory,
    assumed: Assumptions,
    cpu_seconds: Callable[[TrainConfig], tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """The whole plan as plain data: what --json prints and what the tables show. `why_not`: the reason for no mixture;
    `found`: the memory of the run.

    Without a GPU it is a plan for this machine's CPU; `cpu_seconds` returns the seconds of a step on it, and the slowdown
    by other programs.
    """
    layout = preflight.layout_of(config, gpus)
    estimate, count = memory.memory_estimate(config.model, layout), count_parameters(config.model)
    plan: dict[str, Any] = {
        "gpus": gpus,
        "gpu": gpu and asdict(gpu),
        "parameters": asdict(count) | {"total": count.total},
        "flops_per_token": flops_per_token(config.model, adapter=config.adapter),
        "flops_convention": flops_convention(config.adapter),
        "update_flops": time.update_flops(config.model, layout),
        "layout": asdict(layout),
        "compiled": config.parallel.is_compiled(gpu is not None),
        "memory_bytes": estimate.moments,
        "memory_peak_bytes": estimate.peak,
        "memory_peak_moment": estimate.moment,
        "memory_runtime_bytes": memory.RUNTIME_BYTES,
        "state_bytes": memory.state_bytes(config.model, config.optim.name, config.adapter, config.parallel.precision),
        "fits": None,
        "largest_micro_batch_size": None,
        "machine": None,
        "cost": None,
        "step": None,
        "scaling": [],
        "assumptions": asdict(assumed),
        "warnings": [str(caution) for caution in preflight.cautions(config, mixture, gpu is None)],
    }
    if gpu:
        plan["fits"] = found.fits
        plan["largest_micro_batch_size"] = {
            way: memory.largest_micro_batch(config.model, replace(layout, activation_checkpointing=way), gpu.memory_bytes)
            for way in get_args(Checkpointing)
        }
        tokens, updates = config.tokens_by(config.steps), config.steps * plan["update_flops"]
        plan["cost"] = asdict(time.run_cost(config.model, tokens, gpus, gpu, assumed, updates, config.adapter))
    if gpu and gpu.name in scaling.LINKS:
        step = scaling.step_estimate(config.model, layout, gpu, scaling.LINKS[gpu.name], assumed.mfu)
        plan["step"] = asdict(step) | {"exposed_seconds": step.exposed_seconds}
        plan["scaling"] = scaling.scaling_rows(config.model, layout, gpu, assumed.mfu)
    run_seconds = plan["cost"] and plan["cost"]["seconds"]
    if not gpu:
        plan["machine"] = on_this_machine(config, found, cpu_seconds)
        run_seconds = plan["machine"]["seconds"]
    return plan | schedule(config, run_seconds, mixture, why_not)


def on_this_machine(
    config: TrainConfig, found: preflight.Memory, cpu_seconds: Callable[[TrainConfig], tuple[float, float]] | None
) -> dict[str, Any]:
    """Memory and time on this machine's CPU; a run that does not fit is not timed."""
    step, slowdown = cpu_seconds(config) if cpu_seconds and found.fits is not False else (None, None)
    return {
        "memory_needed_bytes": found.needed,
        "memory_available_bytes": found.available,
        "fits": found.fits,
        "step_seconds": step,
        "slowdown": slowdown,
        "seconds": step and step * config.steps,
        "tokens_per_second": step and config.tokens_per_step / step,
    }


def schedule(config: TrainConfig, seconds: float | None, mixture: Mixture | None, why_not: str | None) -> dict[str, Any]:
    """Learning rate, tokens and time at milestones; epochs of each source; evaluations; checkpoints and their size."""
    steps, every = config.steps, config.eval.interval_steps
    saved, kept = time.checkpoint_counts(steps, config.checkpoint)
    bytes_each = memory.checkpoint_bytes(config.model, config.optim.name, config.adapter)
    weights = {name: source.weight for name, source in config.data.sources.items() if name != UNNAMED}
    visits = mixture and visits_before(mixture, config.batches.places_before(steps + 1))
    return {
        "total_steps": steps,
        "total_tokens": config.tokens_by(steps),
        "global_batch_size": config.global_batch_size,
        "batches": config.batches.changes,
        "seq_len": config.model.seq_len,
        "tokens_per_step": config.tokens_per_step,
        "milestones": [
            {
                "step": step,
                "tokens": config.tokens_by(step),
                "lr": lr_at(step, config.optim, steps),
                "seconds": seconds and seconds * config.tokens_by(step) / config.tokens_by(steps),
            }
            for step in time.milestones(steps, config.optim.warmup_steps, *(first for first, _ in config.batches.changes))
        ],
        "sources": {
            name: {
                "weight": weight,
                "tokens": mixture.sources[i].n_tokens if mixture else None,
                "instances": int(visits[i]) if mixture else None,
                "epochs": float(visits[i] / mixture.sizes[i]) if mixture else None,
            }
            for i, (name, weight) in enumerate(weights.items())
        },
        "sources_unknown": why_not,
        "evaluations": -(-steps // every) if config.data.validation or config.eval.downstream else 0,
        "checkpoints_saved": saved,
        "checkpoints_kept": kept,
        "checkpoint_bytes": bytes_each,
        "checkpoints_disk_bytes": (kept + 1) * bytes_each,  # one more while a new one is written
    }


def visits_before(mixture: Mixture, places: int) -> np.ndarray:
    """Visits of each source, (sources,) fp64; in proportion where a run has more places than an int64 can count."""
    most = 2**60
    return mixture.order.visits_before(min(places, most)) * max(1.0, places / most)

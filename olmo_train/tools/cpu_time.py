"""The time of a training step on this machine's CPU, from a short measurement that is cached."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import torch

from olmo_train.hardware import cpuinfo
from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import count_parameters, flops_per_token, trained_parameters
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.optim.build import build_optimizer
from olmo_train.parallel.kernels import choose_cpu_kernels, has_cpu_kernels, select_kernels
from olmo_train.parallel.shard import DTYPES
from olmo_train.storage import cache_folder, replace_file
from olmo_train.train_config import TrainConfig

FORMAT = 2  # of the cached measurement; a file of another version is not read
MOST_FLOPS = 2e10  # of one timed forward and backward, so that all of them take seconds
CALLS, ENOUGH_SECONDS = 12, 5.0  # of a timed function: fewer calls when they take this long, but at least 2
BUSY = 1.25  # wall time over CPU time from which a machine with a high load average is busy


def step_seconds(config: TrainConfig) -> tuple[float, float]:
    """(seconds of a step on this machine's CPU when no other program runs, how many times as long it takes beside those that
    run now), without logging, evaluation and saving. The second is 1 on a quiet machine, and for a cached measurement.

    Times a forward and backward of models with one and with two of the blocks, and an update of the optimizer, and extends the
    times to all blocks, parameters and tokens. All processes of a machine share its cores, so their number does not matter.
    With adapters the passes are timed as in full training, which is more.
    """
    parallel = config.parallel
    if parallel.cpu_kernels is None and has_cpu_kernels(None, torch.device("cpu")):
        config = replace(config, parallel=replace(parallel, cpu_kernels=choose_cpu_kernels(config)))
    timed = _cached(config)
    block = max(0.0, timed["two"] - timed["one"])
    again = 4 / 3 if config.parallel.activation_checkpointing == "full" else 1.0
    pass_seconds = (timed["one"] + (config.model.n_layers - 1) * block) * again
    update = timed["update"] * trained_parameters(config.model, config.adapter)
    return pass_seconds * config.tokens_per_step / timed["tokens"] + update, timed["slowdown"]


def _cached(config: TrainConfig) -> dict[str, float]:
    """The measurement, from the cache folder if this machine has made it before while it was quiet."""
    processor = next((line for line in cpuinfo() if line.startswith("model name")), "")
    about: list[object] = [asdict(replace(config.model, n_layers=2)), config.optim.name, config.parallel.precision, processor]
    about += [config.parallel.cpu_kernels, config.micro_batch_size, torch.get_num_threads(), torch.__version__]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    file = cache_folder() / f"cpu-time-{FORMAT}" / f"{key}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        measured = _measure(config)
    if measured["slowdown"] > 1:
        return measured
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(measured).encode())
    except OSError:  # without a writable cache it is measured again next time
        pass
    return measured


def _measure(config: TrainConfig) -> dict[str, float]:
    """Seconds of a forward and backward with one and two blocks over `tokens` tokens, of an update per parameter, and the
    slowdown by other programs.

    On a busy machine the seconds are the CPU time of the calling thread, which does its share of all parallel work: waiting for
    a core or for the other threads does not count.
    """
    shape = replace(config.model, n_layers=2)
    affordable = MOST_FLOPS / flops_per_token(shape)
    seq_len = int(min(shape.seq_len, max(affordable, 32)))
    rows = int(max(1, min(config.micro_batch_size, affordable // seq_len)))
    ids = torch.randint(shape.vocab_size, (rows, seq_len))
    one, two = _model(replace(shape, n_layers=1), config), _model(shape, config)
    passes = [lambda model=model: model(ids, ids).sum().backward() for model in (one, two)]
    times = dict(zip(("one", "two"), _times(*passes), strict=True))
    two.float()
    (times["update"],) = _times(build_optimizer(dict(two.named_parameters()), config.optim).step)
    wall, own = np.concatenate(list(times.values())).sum(axis=0).tolist()
    is_busy = wall > BUSY * own and os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    seconds = {name: float(calls[:, int(is_busy)].min()) for name, calls in times.items()}
    seconds["update"] /= count_parameters(shape).total
    return seconds | {"tokens": ids.numel(), "slowdown": wall / own if is_busy else 1.0}


def _model(shape: ModelConfig, config: TrainConfig) -> Transformer:
    model = Transformer(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, shape, config.seed))
    select_kernels(model, replace(config.parallel, float8=False), torch.device("cpu"), compiled=False)
    return model.to(DTYPES[config.parallel.precision])


def _times(*functions: Callable[[], object]) -> np.ndarray:
    """(wall time, CPU time of this thread) in seconds of each call, (functions, calls, 2), without the first, which is slower.
    The functions take turns, so that they are timed under the same load."""
    rounds: list[np.ndarray] = []
    started = time.perf_counter()
    while len(rounds) < 3 or (len(rounds) <= CALLS and time.perf_counter() - started < ENOUGH_SECONDS):
        clocks = [_clocks()]
        for function in functions:
            function()
            clocks.append(_clocks())
        rounds.append(np.diff(clocks, axis=0))
    return np.stack(rounds[1:], axis=1)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()

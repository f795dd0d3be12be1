"""The time of a training step on this machine's CPU, from a short measurement that is cached."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from olmo_train.hardware import cpuinfo
from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import count_parameters, flops_per_token
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.optim.build import build_optimizer
from olmo_train.parallel.kernels import select_kernels
from olmo_train.parallel.shard import DTYPES
from olmo_train.storage import cache_folder, replace_file
from olmo_train.train_config import TrainConfig

MOST_FLOPS = 4e9  # of one timed forward and backward, so that all of them take seconds


def step_seconds(config: TrainConfig) -> float:
    """Seconds of a step on this machine's CPU, without logging, evaluation and saving.

    Times a forward and backward of models with one and with two of the blocks, and an update of the optimizer, and extends the
    times to all blocks, parameters and tokens. All processes of a machine share its cores, so their number does not matter.
    """
    timed = _cached(config)
    block = max(0.0, timed["two"] - timed["one"])
    again = 4 / 3 if config.parallel.activation_checkpointing == "full" else 1.0
    pass_seconds = (timed["one"] + (config.model.n_layers - 1) * block) * again
    update = timed["update"] * count_parameters(config.model).total
    return pass_seconds * config.tokens_per_step / timed["tokens"] + update


def _cached(config: TrainConfig) -> dict[str, float]:
    """The measurement, from the cache folder if this machine has made it before."""
    processor = next((line for line in cpuinfo() if line.startswith("model name")), "")
    about: list[object] = [asdict(replace(config.model, n_layers=2)), config.optim.name, config.parallel.precision, processor]
    about += [config.parallel.cpu_kernels, config.micro_batch_size, torch.get_num_threads(), torch.__version__]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    file = cache_folder() / "cpu-time" / f"{key}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        wall, own = time.perf_counter(), time.process_time()
        measured = _measure(config)
    is_busy = time.process_time() - own < 0.5 * (time.perf_counter() - wall)
    if is_busy:  # with other programs: too slow to be kept
        return measured
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(measured).encode())
    except OSError:  # without a writable cache it is measured again next time
        pass
    return measured


def _measure(config: TrainConfig) -> dict[str, float]:
    """Seconds of a forward and backward with one and two blocks over `tokens` tokens, and of an update per parameter."""
    two = replace(config.model, n_layers=2)
    affordable = MOST_FLOPS / flops_per_token(two)
    seq_len = int(min(two.seq_len, max(affordable, 32)))
    rows = int(max(1, min(config.micro_batch_size, affordable // seq_len)))
    ids = torch.zeros(rows, seq_len, dtype=torch.int64)
    seconds, update = {}, 0.0
    for name, n_layers in (("one", 1), ("two", 2)):
        model = _model(replace(two, n_layers=n_layers), config)
        seconds[name] = _fastest(lambda model=model: model(ids, ids).sum().backward())
        if n_layers == 2:
            model.float()
            optimizer = build_optimizer(dict(model.named_parameters()), config.optim)
            update = _fastest(optimizer.step) / count_parameters(model.config).total
    return seconds | {"update": update, "tokens": ids.numel()}


def _model(shape: ModelConfig, config: TrainConfig) -> Transformer:
    model = Transformer(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, shape, config.seed))
    select_kernels(model, replace(config.parallel, compile=False, float8=False), torch.device("cpu"))
    return model.to(DTYPES[config.parallel.precision])


def _fastest(function: Callable[[], object], times: int = 3, enough_seconds: float = 1.0) -> float:
    """Seconds of the fastest of some calls: the first one is slower, and so is any beside other work on the machine. A single
    call of `enough_seconds` is enough."""
    seconds: list[float] = []
    while len(seconds) < times and sum(seconds) < enough_seconds:
        before = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - before)
    return min(seconds)

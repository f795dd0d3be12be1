"""What many tests do with a run: train in this process, cut it off, read what it wrote.

trained(config)              train to the end; returns config
trained_on(size, config)     the same on forked ranks
cut(config, steps)           train some steps and drop the run, as a kill between two steps would
lines_of(run_dir)            metrics.jsonl as a list of dicts
events_of(run_dir, *kinds)   events.jsonl, only the events of these kinds
history(run_dir, *names)     these figures of every line that holds a training step
first_model(config)          a whole Transformer with its first values
load_script(file)            a script that is not in a package, as a module
wait_for(run_dir, lines)     until another process has logged this many lines
first_quick(values)          the values of a parametrized test, of which only the first is tried by the quick tests
"""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from olmo_train.model.config import ModelConfig
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.train import train

LOSS, GRAD_NORM = "train/CrossEntropyLoss", "optim/total_grad_norm"
# The figures of a step that a resumed run repeats bit for bit.
SAME = ("step", LOSS, GRAD_NORM, "optim/learning_rate_group0", "optim/clipping_rate", "sample_hash", "skipped",
        "throughput/total_tokens", "throughput/total_flops")  # fmt: skip


def first_quick(values, quick=1):
    """For tests that take seconds for each value: the first `quick` are run by `make test`, the others by `make slow`."""
    sets = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each, marks=() if i < quick else pytest.mark.slow) for i, each in enumerate(sets)]


def trained(config, world=None):
    for _ in train(config, world):
        pass
    return config


def trained_on(size: int, config):
    on_ranks(size, lambda world: trained(config, world) and None)
    return config


def cut(config, steps: int):
    run = train(config)
    for stats in run:
        if stats.step == steps:
            run.close()  # which logs and saves this step
    return config


def first_model(config: ModelConfig, seed: int = 1) -> Transformer:
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config, seed))
    return model


def load_script(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(run_dir, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def events_of(run_dir, *kinds: str) -> list[dict]:
    return [event for event in lines_of(run_dir, "events.jsonl") if not kinds or event["event"] in kinds]


def wait_for(run_dir, lines: int, seconds: float = 60) -> None:
    metrics, deadline = Path(run_dir) / "metrics.jsonl", time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, f"{metrics} has no {lines} lines after {seconds} s"
        time.sleep(0.005)


def history(run_dir, *names: str) -> list[tuple]:
    return [tuple(line[name] for name in names or SAME) for line in lines_of(run_dir) if LOSS in line]

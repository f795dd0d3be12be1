"""Train a few sizes of a model for several lengths, and forecast the loss of a larger one.

A ladder is a folder of ordinary run_dirs. Each size has a stable run at the peak learning rate, and for each multiple of 20
tokens per parameter a branch that starts from one of its checkpoints and decays the learning rate. A branch is bit for bit the
run with schedule wsd that trains from the start to the same length.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from olmo_train import config as configuration
from olmo_train.checkpoint.folders import committed, folder_of
from olmo_train.errors import ConfigError, DataError
from olmo_train.formats import counted
from olmo_train.history import STARTS, History
from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import count_parameters, flops_per_token
from olmo_train.predict import fit
from olmo_train.predict.sweep import Point, result
from olmo_train.storage import hash_file, replace_file
from olmo_train.train_config import TrainConfig

TOKENS_PER_PARAMETER = 20  # compute-optimal by Hoffmann et al. 2022; a multiple of 1 is as long
MULTIPLE_OF = 8  # mlp_hidden of a size WxL is rounded to it
SAME_TARGET = 0.02  # a run is the target of a forecast whose parameters and tokens differ by no more
# The length and the schedule follow from the multiple.
NO_LENGTHS = ("total_tokens=null", "total_epochs=null", "optim.schedule_steps=null", "optim.schedule_tokens=null",
              "optim.decay_steps=null", "optim.decay_tokens=null")  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """A branch: one point of the fit."""

    size: str
    multiple: float
    parameters: int
    tokens: int
    start: int  # the step of the stable run that it goes on from; 0: it trains from the start
    point: Point

    @property
    def name(self) -> str:
        """Such as 128x4 2x."""
        return f"{self.size} {self.multiple:g}x"


@dataclass(frozen=True)
class Ladder:
    """`points`: all runs, a stable run before its branches; `rungs`: the branches."""

    folder: Path
    points: tuple[Point, ...]
    rungs: tuple[Rung, ...]

    @property
    def tokens(self) -> int:
        """That all runs train on; a branch starts where it leaves its stable run."""
        stable = sum(point.config.tokens_by(point.config.steps) for point in self.points if point.parent is None)
        return stable + sum(rung.tokens - rung.point.config.tokens_by(rung.start) for rung in self.rungs)

    @property
    def separate_tokens(self) -> int:
        """That separate runs from the start would train on."""
        return sum(rung.tokens for rung in self.rungs)


def parameters_of(model: ModelConfig) -> int:
    """N of the fit: all parameters but a separate input embedding, which is a look-up; as the runs of AI2's ladder count."""
    count = count_parameters(model)
    return count.total - (0 if model.tie_embeddings else count.embedding)


def plan_ladder(
    files: Sequence[str], words: Sequence[str], sizes: Sequence[str], multiples: Sequence[float], decay: float
) -> Ladder:
    """The runs of all sizes and multiples; `decay`: the share of a run in which the learning rate falls. The largest size comes
    first, since it takes the longest. Raises ConfigError for sizes and multiples that cannot be fitted."""
    if len(set(multiples)) < 2:
        raise ConfigError("--multiples", f"{counted(len(set(multiples)), 'multiple')} cannot be fitted; name 2 or more, as 1,2,4")
    if len(set(sizes)) < 3:
        what = f"{counted(len(set(sizes)), 'size')} cannot be fitted"
        raise ConfigError("--sizes", f"{what}; name 3 or more, as 128x4,192x6,256x8 (d_model x n_layers) or YAML files")
    found = []
    for size in sizes:
        own = [*files, *files_of(size)], [*words, *words_of(size, files, words), *NO_LENGTHS]
        found.append(plan_size(*own, name_of(size), sorted(multiples), decay))
    found.sort(key=lambda planned: -planned[1][0].parameters)
    names = [rungs[0].size for _, rungs in found]
    if len(set(names)) < len(names):
        raise ConfigError("--sizes", f"two sizes have the same name, {max(names, key=names.count)}; rename a file")
    if fit.distinct(np.array([rungs[0].parameters for _, rungs in found])) < 3:
        counts = ", ".join(f"{rungs[0].size} {rungs[0].parameters:,}" for _, rungs in found)
        raise ConfigError("--sizes", f"are fewer than 3 different sizes ({counts} parameters); name others")
    rungs = tuple(rung for _, rungs in found for rung in rungs)
    folder = rungs[0].point.run_dir.parent.parent
    return Ladder(folder, tuple(point for points, _ in found for point in points), rungs)


def plan_size(
    files: list[str], words: list[str], name: str, multiples: Sequence[float], decay: float
) -> tuple[list[Point], list[Rung]]:
    """The stable run of a size and its branches, the longest first."""
    plain = [*words, "optim.schedule=constant", "optim.decay_shape=linear"]
    base = configuration.load(TrainConfig, files, [*plain, "total_steps=1", "optim.warmup_steps=0", "optim.warmup_tokens=null"])
    parameters, folder = parameters_of(base.model), Path(base.run_dir) / name
    lengths = [base.batches.steps_for(multiple * TOKENS_PER_PARAMETER * parameters, base.model.seq_len) for multiple in multiples]
    decays = [max(1, round(decay * steps)) for steps in lengths]
    starts = [steps - decay_steps for steps, decay_steps in zip(lengths, decays, strict=True)]
    saves = f"checkpoint.save_steps=[{','.join(map(str, starts))}]"
    own = [*plain, f"total_steps={max(1, starts[-1])}", saves, f"run_dir={folder}/stable"]
    stable = Point((name, "stable"), configuration.load(TrainConfig, files, own), (*files, *own))
    warmup = stable.config.in_steps().optim.warmup_steps
    if max(warmup, 1) > starts[0]:
        what = f"{warmup} of the size {name} is longer than the {counted(starts[0], 'step')} before the first decay"
        raise ConfigError("optim.warmup_steps", f"{what}; set it lower, leave out the smallest multiple, or set a smaller batch")
    branches = []
    for multiple, steps, decay_steps, first in zip(multiples, lengths, decays, starts, strict=True):
        start = start_of(folder / "stable", first)
        resumes = [f"resume_from={folder_of(folder / 'stable', start)}"] if start else []
        own = [*words, "optim.schedule=wsd", f"total_steps={steps}", f"optim.decay_steps={decay_steps}", *resumes,
               f"run_dir={folder}/{multiple:g}x"]  # fmt: skip
        config = configuration.load(TrainConfig, files, own)
        point = Point((name, f"{multiple:g}x"), config, (*files, *own), folder / "stable")
        branches.append(Rung(name, multiple, parameters, config.tokens_by(steps), start, point))
    branches.reverse()
    return [stable, *(rung.point for rung in branches)], branches


def start_of(stable: Path, first: int) -> int:
    """The step of a stable run that a branch goes on from, whose decay begins after step `first`: that step, or the newest
    checkpoint before it when the run has passed it without saving, as no branch was to start there. 0 without one."""
    saved = committed(stable)
    return max((step for step in saved if step <= first), default=0) if max(saved, default=0) >= first else first


def name_of(size: str) -> str:
    """The folder of a size: as typed, or the name of its file."""
    return Path(size).stem if files_of(size) else size


def files_of(size: str) -> list[str]:
    """The YAML file of a size that is one."""
    return [size] if size.endswith((".yaml", ".yml")) else []


def words_of(size: str, files: Sequence[str], words: Sequence[str]) -> list[str]:
    """The keys that a size WxL sets: width and depth, and with the configuration's ratios heads and mlp_hidden. Raises
    ConfigError when a head of the configuration does not divide the width."""
    if files_of(size):
        return []
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not match:
        raise ConfigError("--sizes", f"'{size}' is no size; write d_model x n_layers, such as 128x4, or a YAML file")
    model = configuration.build(ModelConfig, configuration.read(list(files), list(words)).get("model", {}), "model")
    width, layers = map(int, match.groups())
    if width % model.head_size or (width // model.head_size) % (model.n_heads // model.kv_heads):
        step = model.head_size * (model.n_heads // model.kv_heads)
        raise ConfigError(
            "--sizes", f"the width of {size} is not a multiple of {step}, the size of a head and its group; use one"
        )
    heads = width // model.head_size
    hidden = max(1, round(model.mlp_hidden * width / model.d_model / MULTIPLE_OF)) * MULTIPLE_OF
    own = {"d_model": width, "n_layers": layers, "n_heads": heads, "mlp_hidden": hidden}
    if model.n_kv_heads is not None:
        own["n_kv_heads"] = heads * model.n_kv_heads // model.n_heads
    return [f"model.{key}={value}" for key, value in own.items()]


@dataclass(frozen=True)
class Target:
    """A run to forecast."""

    parameters: float
    tokens: float
    flops: float  # of its training


def target_of(text: str, files: Sequence[str], words: Sequence[str]) -> Target:
    """Of --forecast N,D: N is a number of parameters, which train with 6 N D FLOPs, or a size, whose FLOPs are counted. Raises
    ConfigError."""
    size, _, length = text.rpartition(",")
    named = files_of(size) or re.fullmatch(r"\d+x\d+", size)
    model = None
    if named and files:
        own = [*files, *files_of(size)], [*words, *words_of(size, files, words)]
        model = configuration.build(ModelConfig, configuration.read(*own).get("model", {}), "model")
    try:
        parameters, tokens = float(parameters_of(model) if model else size), float(length)
    except ValueError:
        parameters = tokens = math.nan
    if not all(math.isfinite(value) and value > 0 for value in (parameters, tokens)):
        raise ConfigError("--forecast", f"'{text}' is not N,D; write parameters and tokens above 0, such as 7e9,2e12")
    return Target(parameters, tokens, (flops_per_token(model) if model else 6 * parameters) * tokens)


# ---- after the runs


@dataclass(frozen=True)
class Measured:
    """The rungs that have finished, with their losses by one metric."""

    rungs: tuple[Rung, ...]
    metric: str
    losses: tuple[float, ...]

    @property
    def points(self) -> fit.Points:
        """The table of the fit."""
        columns = ([rung.parameters for rung in self.rungs], [rung.tokens for rung in self.rungs], self.losses)
        return fit.Points(*(np.array(column, dtype=np.float64) for column in columns))

    @cached_property
    def speed(self) -> tuple[str, float] | None:
        """The run with the most compute, and the median of its FLOP/s; None if it was too short to measure any."""
        from olmo_train.curves.runs import read_run

        largest = max(self.rungs, key=lambda rung: rung.parameters * rung.tokens)
        rates = read_run(largest.point.run_dir).series.get("throughput/tokens_per_second")
        if rates is None:
            return None
        return largest.name, float(np.median(rates.values)) * flops_per_token(largest.point.config.model)

    def write_table(self, file: Path) -> None:
        """Write what `ladder --fit` reads."""
        rows = zip(self.rungs, self.losses, strict=True)
        lines = [f"{rung.size}-{rung.multiple:g}x,{rung.parameters},{rung.tokens},{loss!r}" for rung, loss in rows]
        replace_file(file, "\n".join([f"# {self.metric}", "run,parameters,tokens,loss", *lines, ""]).encode())


def measure(rungs: Sequence[Rung], metric: str) -> Measured:
    """The losses of finished rungs. Raises DataError when a run has not logged the metric."""
    losses = tuple(result(rung.point, metric) for rung in rungs)
    for rung, loss in zip(rungs, losses, strict=True):
        if not (math.isfinite(loss) and loss > 0):
            raise DataError(rung.point.run_dir, f"has {loss} as {metric}, which cannot be fitted; leave out its size")
    return Measured(tuple(rungs), metric, losses)


def inputs_of(folder: Path, measured: Measured) -> dict[str, str]:
    """The hash of each file that a forecast rests on: {path below the ladder's folder: sha256}."""
    files = [rung.point.run_dir / name for rung in measured.rungs for name in ("config.yaml", "metrics.jsonl")]
    return {str(file.relative_to(folder)): hash_file(file) for file in files}


def hash_of(inputs: dict[str, str]) -> str:
    """One hash of all."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def read_forecasts(folder: Path) -> list[dict[str, Any]]:
    """The forecasts that were written to the folder of a ladder, oldest first."""
    file = folder / "forecasts.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def write_forecast(folder: Path, measured: Measured, found: fit.Fit, forecast: fit.Forecast) -> dict[str, Any]:
    """Add a forecast to those of the folder, with its time and the hash of all inputs. One that is there already stays."""
    inputs, before = inputs_of(folder, measured), read_forecasts(folder)
    what = {"metric": measured.metric, "forecast": asdict(forecast), "fit": found.record(), "inputs_sha256": hash_of(inputs)}
    for record in before:
        if what.items() <= record.items():
            return record
    record = {"time": time.time(), **what, "inputs": inputs}
    replace_file(folder / "forecasts.json", (json.dumps([*before, record], indent=1) + "\n").encode())
    return record


@dataclass(frozen=True)
class Check:
    """A run beside the forecast that was made for it."""

    record: dict[str, Any]
    loss: float
    notes: tuple[str, ...]  # why the comparison may prove nothing

    @property
    def is_inside(self) -> bool:
        """Whether the loss lies in the interval."""
        return self.record["forecast"]["low"] <= self.loss <= self.record["forecast"]["high"]

    @property
    def error(self) -> float:
        """Forecast over measured loss, less 1."""
        return self.record["forecast"]["loss"] / self.loss - 1


def check(run_dir: Path, folder: Path | None = None) -> Check:
    """Compare a finished run with the newest forecast for its parameters and tokens that was written before it started, in
    `folder` or the nearest folder above. Raises ConfigError, DataError."""
    above = [folder] if folder else list(run_dir.absolute().parents)
    folder = next((each for each in above if (each / "forecasts.json").is_file()), None)
    if folder is None:
        raise ConfigError("--check", f"no ladder above {run_dir} has a forecast; name its folder as run_dir=FOLDER")
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError("--check", f"{run_dir} is no run_dir; name the folder of the run that was forecast")
    config = configuration.load(TrainConfig, [run_dir / "config.yaml"])
    history = History(run_dir)
    if history.last_step() < config.steps:
        raise DataError(run_dir, f"has made {history.last_step()} of {config.steps} steps; check it when it has finished")
    parameters, tokens = parameters_of(config.model), config.tokens_by(config.steps)

    def is_for(forecast: dict[str, float]) -> bool:
        ratios = forecast["parameters"] / parameters, forecast["tokens"] / tokens
        return all(abs(ratio - 1) <= SAME_TARGET for ratio in ratios)

    records = [record for record in read_forecasts(folder) if is_for(record["forecast"])]
    if not records:
        what = f"{folder} has no forecast for {parameters:,} parameters and {tokens:,} tokens"
        raise ConfigError("--check", f"{what}; run ladder --forecast {parameters},{tokens} before the run starts")
    started = next((event["time"] for event in history.events if event["event"] in STARTS), math.inf)
    record = ([record for record in records if record["time"] <= started] or records)[-1]
    notes = []
    if record["time"] > started:
        notes.append("the forecast was written after the run had started")
    files = {folder / name: sha256 for name, sha256 in record["inputs"].items()}
    if changed := [file for file, sha256 in files.items() if not file.is_file() or hash_file(file) != sha256]:
        notes.append(f"{counted(len(changed), 'input')} of the forecast changed since, such as {changed[0]}")
    return Check(record, result(Point((), config, ()), record["metric"]), tuple(notes))

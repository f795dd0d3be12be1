"""Evaluation during a run: the loss on held-out sources, and downstream tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_train.checkpoint import folders
from olmo_train.data.loader import validation_batches
from olmo_train.data.mixture import Mixture
from olmo_train.data.tokenizer import TokenizerRecord, load_tokenizer
from olmo_train.errors import ConfigError, did_you_mean, near
from olmo_train.eval.downstream import TokenizedTask, load_task, results_of, score
from olmo_train.eval.perplexity import loss_sums
from olmo_train.formats import counted
from olmo_train.history import History
from olmo_train.log.interval import MeanLoss
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import shard
from olmo_train.parallel.determinism import DETERMINISM
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig


@dataclass
class Best:
    """The best evaluation so far: the one with the smallest checkpoint.keep_best."""

    metric: str | None  # checkpoint.keep_best
    stop_after: int | None  # eval.stop_after
    step: int | None = None
    value: float = math.inf
    since: int = 0  # evaluations in a row without a better one

    def add(self, step: int, metrics: dict[str, Any], can_be_best: bool = True) -> None:
        """Compare the metrics of an evaluation; the first of equal ones is the best. A non-finite value is null or NaN."""
        if self.metric not in metrics:
            return
        value = metrics[self.metric]
        if value is not None and value < self.value and can_be_best:
            self.step, self.value, self.since = step, value, 0
        elif self.step is not None:
            self.since += 1

    @property
    def ends_run(self) -> bool:
        """Whether eval.stop_after ends the run."""
        return self.stop_after is not None and self.since >= self.stop_after

    def is_kept(self, step: int) -> bool:
        """Whether to save after this step, besides checkpoint.is_due: it is the best one, or the last one of the run."""
        return self.step == step or self.ends_run

    def record(self) -> dict[str, Any] | None:
        """The contents of best.json; None before the first evaluation."""
        return None if self.step is None else {"step": self.step, "metric": self.metric, "value": self.value}

    def __str__(self) -> str:
        evaluations = f"{counted(self.since, 'evaluation')} without a better {self.metric}"
        return f"{evaluations} than {self.value:.4f} of step {self.step} (eval.stop_after {self.stop_after})"


class Evaluation:
    """The validation sources and downstream tasks of a run, opened once."""

    def __init__(self, config: TrainConfig, world: World, mixture: Mixture):
        """Raises ConfigError and DataError."""
        self.config, self.world, self.mixture = config, world, mixture
        self.sources = mixture.open_validation()
        self.tokenizer: TokenizerRecord | None = None  # of the tasks
        self.tasks = self._open_tasks()
        self.best = self._open_best()

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to evaluate after this step."""
        due = last or step % self.config.eval.interval_steps == 0
        return due and bool(self.sources or self.tasks)

    def _open_best(self) -> Best:
        """Raises ConfigError when checkpoint.keep_best is no metric of data.validation."""
        name, stop_after = self.config.checkpoint.keep_best, self.config.eval.stop_after
        known = [metric for source in self.sources for metric in MeanLoss(1, 1, source.n_bytes).metrics(f"eval/{source.name}")]
        there = f"the metrics of data.validation are {', '.join(known)}" if known else "data.validation names no source"
        if name is None and stop_after is not None:
            raise ConfigError("eval.stop_after", f"{stop_after} needs checkpoint.keep_best, the metric to improve; {there}")
        if name is not None and name not in known:
            close = did_you_mean(near(name, known)[:1])
            what = f"'{name}' is no metric of this run; {there}{'; ' if close else ''}{close}"
            raise ConfigError("checkpoint.keep_best", what)
        return Best(name, stop_after)

    def recall(self, run_dir: Path, step: int) -> None:
        """Count the evaluations that metrics.jsonl has up to the step which the run resumes from, on every rank.

        They decide, and not best.json: a killed run may have logged an evaluation, or saved its step, and not written that file.
        An evaluation whose checkpoint is gone cannot be the best: keep_best was set after it.
        """

        def read() -> Best:
            kept = folders.committed(run_dir)
            for line in History(run_dir).lines():
                if line["step"] <= step:
                    self.best.add(line["step"], line, line["step"] in kept)
            if self.best.step is None and self.best.metric:
                (run_dir / folders.BEST).unlink(missing_ok=True)  # of steps that the run computes again
            folders.write_best(run_dir, self.best.record())
            return self.best

        if self.best.metric is not None:
            self.best = self.world.on_main(read)

    def _open_tasks(self) -> list[TokenizedTask]:
        """The downstream tasks, tokenized."""
        wanted, shape = self.config.eval, self.config.model
        if not wanted.downstream:
            return []
        named = wanted.tokenizer or next((source.folder for source in self.mixture.sources if source.folder), None)
        if named is None:
            raise ConfigError("eval.tokenizer", "is needed for eval.downstream, as the data are raw token files; name theirs")
        try:
            tokenizer = load_tokenizer(named)
        except ConfigError as problem:
            raise ConfigError("eval.tokenizer", str(problem)) from problem
        self.tokenizer = tokenizer.record("eval.tokenizer")
        if tokenizer.vocab_size > shape.vocab_size:
            raise ConfigError(
                "eval.tokenizer",
                f"{tokenizer.name} has {tokenizer.vocab_size} ids, the model only {shape.vocab_size}; name that of the data",
            )
        try:
            return [load_task(word, tokenizer, shape.seq_len, wanted.downstream_limit) for word in wanted.downstream]
        except ConfigError as problem:
            raise ConfigError("eval.downstream", problem.what) from problem

    def measure(self, model: Transformer, heartbeat: Callable[[], None], stop: Callable[[], bool]) -> dict[str, float] | None:
        """Loss on each source and results of each task; None, on all ranks, if `stop()` became true. Calls `heartbeat` before
        each batch."""
        config, world, seq_len, metrics = self.config, self.world, self.config.model.seq_len, {}
        rows = DETERMINISM[config.determinism].rows_per_forward or config.micro_batch_size

        def watched(batches: Iterable, *_: object) -> Iterator:
            for batch in batches:
                heartbeat()
                yield batch

        try:
            for source in self.sources:
                batches = validation_batches(source, seq_len, rows, world.data_rank, world.data_size, self.mixture.eos_id)
                loss, tokens = world.sum(loss_sums(model, watched(batches), stop)).tolist()
                if stop():
                    return None
                # A source's n_bytes are the text of all its tokens, all of which but the first are scored.
                metrics |= MeanLoss(loss, tokens, source.n_bytes).metrics(f"eval/{source.name}")
            for task in self.tasks:
                batch_tokens = config.micro_batch_size * seq_len
                scores = world.sum(score(model, task, batch_tokens, world.data_rank, world.data_size, stop, watched))
                if stop():
                    return None
                metrics |= results_of(task, scores.tolist()).metrics()
            return metrics
        finally:
            shard.reshard(model)  # a save may follow, which needs sharded parameters

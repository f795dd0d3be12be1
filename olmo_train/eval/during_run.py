"""Evaluation during a run: the loss on held-out sources, and downstream tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from olmo_train.data.loader import validation_batches
from olmo_train.data.mixture import Mixture
from olmo_train.data.tokenizer import TokenizerRecord, load_tokenizer
from olmo_train.errors import ConfigError
from olmo_train.eval.downstream import TokenizedTask, load_task, results_of, score
from olmo_train.eval.perplexity import loss_sums
from olmo_train.log.interval import MeanLoss
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import shard
from olmo_train.parallel.determinism import DETERMINISM
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig


class Evaluation:
    """The validation sources and downstream tasks of a run, opened once."""

    def __init__(self, config: TrainConfig, world: World, mixture: Mixture):
        """Raises ConfigError and DataError."""
        self.config, self.world, self.mixture = config, world, mixture
        self.sources = mixture.open_validation()
        self.tokenizer: TokenizerRecord | None = None  # of the tasks
        self.tasks = self._open_tasks()

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to evaluate after this step."""
        due = last or step % self.config.eval.interval_steps == 0
        return due and bool(self.sources or self.tasks)

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

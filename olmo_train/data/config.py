"""The `data` section: sources, mix, order and validation data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from olmo_train.config import Natural, NonNegative, Rule
from olmo_train.data.order import PERIOD, quotas
from olmo_train.errors import ConfigError, check_choice
from olmo_train.storage import FilePath

Paths = Annotated[FilePath | tuple[FilePath, ...], Rule("non-empty", bool)]


@dataclass(frozen=True)
class SourceConfig:
    path: Paths  # a folder written by prepare-data, or raw .npy/.bin token files: a file, a list, a glob; also scheme://
    weight: NonNegative = 1.0  # share of the instances, relative to the other sources; ignored for validation
    dtype: Literal["uint16", "uint32"] | None = None  # type of raw files; null: uint16 for at most 65536 ids


@dataclass(frozen=True)
class StageConfig:
    """A change of the mix during the run, such as annealing on better text."""

    from_step: int  # the first step of the new mix
    weights: dict[str, NonNegative]  # weight of each source, by name; a source that is not listed gets 0


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # training data; each source has a name of your choice
    order: Literal["permute", "olmo"] = "permute"  # permute: keyed permutations and weights; olmo: allenai/OLMo's own shuffle
    seed: Natural | None = None  # of the data order; null: the run's seed
    eos_id: int | None = None  # token that ends a document in raw files; prepared folders name theirs
    document_mask: bool = False  # attention stays within a document, and positions restart with each
    stages: tuple[StageConfig, ...] = ()  # other weights from a step on: [{from_step: 9000, weights: {NAME: 1.0}}]
    # documents to exclude from the loss: [SOURCE:ID, ...], or files with one such word per line
    deny: tuple[FilePath, ...] = ()
    validation: dict[str, SourceConfig] = field(default_factory=dict)  # held-out data, evaluated every eval.interval_steps
    # refuse sources, validation data, tasks or a checkpoint made with different tokenizers; false: warn
    check_tokenizer: bool = True

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources", "names no data; set data.sources.NAME.path to a prepared folder or token file")
        if self.order == "olmo" and (self.stages or len({source.weight for source in self.sources.values()}) > 1):
            raise ConfigError("data.order", "'olmo' reads all sources as one list, so weights and stages need order: permute")
        for stage, change in enumerate(self.stages):
            for name in change.weights:
                check_choice(f"data.stages.{stage}.weights", name, self.sources)
        for stage, (start, weights) in enumerate(self.mixes()):
            self._check_mix(f"data.stages.{stage - 1}" if stage else "data.sources", start, weights)
        starts = [start for start, _ in self.mixes()]
        if starts != sorted(set(starts)):
            raise ConfigError("data.stages", f"must rise from a step above 1, got from_step {starts[1:]}")

    def mixes(self) -> list[tuple[int, list[float]]]:
        """[(first step, weight of each source)], the first at step 1."""
        first = (1, [source.weight for source in self.sources.values()])
        return [first, *((s.from_step, [s.weights.get(name, 0.0) for name in self.sources]) for s in self.stages)]

    def _check_mix(self, where: str, start: int, weights: list[float]) -> None:
        if sum(weights) <= 0:
            raise ConfigError(where, f"not all weights may be 0, got {weights}")
        for name, weight, places in zip(self.sources, weights, quotas(weights), strict=True):
            if weight > 0 and places == 0:
                raise ConfigError(
                    where,
                    f"the weight of {name}, {weight} of {sum(weights)}, is below one in {PERIOD}; raise it or set 0",
                )

"""The `data` section: sources, mix, order and validation data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from olmo_train.data.meta import DTYPES
from olmo_train.data.order import ORDERS, PERIOD, quotas
from olmo_train.errors import ConfigError, check_choice
from olmo_train.storage import FilePath


@dataclass(frozen=True)
class StageConfig:
    """A change of the mix during the run, such as annealing on better text."""

    from_step: int  # the first step of the new mix
    weights: dict[str, float]  # weight of each source, by name; a source that is not listed gets 0


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    order: str = "permute"  # permute: keyed permutations and weights; olmo: allenai/OLMo's own shuffle
    seed: int | None = None  # of the order; null: the run's seed
    eos_id: int | None = None  # end of a document in raw files; prepared folders know theirs
    document_mask: bool = False  # attention stays within documents, positions restart at each
    stages: tuple[StageConfig, ...] = ()
    deny: tuple[FilePath, ...] = ()  # documents that are never a label in training: SOURCE:ID, or files of one such word a line
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    check_tokenizer: bool = True  # refuse sources, validation data or a checkpoint made with different tokenizers

    def __post_init__(self) -> None:
        check_choice("data.order", self.order, ORDERS)
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
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) <= 0:
            raise ConfigError(where, f"weights must be finite, not negative and not all 0, got {weights}")
        for name, weight, places in zip(self.sources, weights, quotas(weights), strict=True):
            if weight > 0 and places == 0:
                raise ConfigError(
                    where,
                    f"the weight of {name}, {weight} of {sum(weights)}, is below one in {PERIOD}; raise it or set 0",
                )


@dataclass(frozen=True)
class SourceConfig:
    path: (
        FilePath | tuple[FilePath, ...]
    )  # a folder written by prepare-data, or raw .npy/.bin token files: a file, a list, a glob; also scheme://
    weight: float = 1.0  # share of the instances, relative to the other sources; ignored for validation
    dtype: str | None = None  # of raw files: uint16 or uint32; null: from the vocabulary (<= 65536 -> uint16)

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError("data.sources", f"weight {self.weight} of {self.path} must be 0 or more")
        if self.dtype is not None:
            check_choice("data.sources.dtype", self.dtype, DTYPES)
        if not self.path:
            raise ConfigError("data.sources", "path is empty; name a folder or token files")

"""The configuration of a run, and figures that follow from it. The defaults are OLMo-7B's recipe."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeAlias,
    Union,
    get_args,
    get_origin,
)

from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.config import Count, Natural, Positive, build, walk
from olmo_train.data.config import DataConfig
from olmo_train.data.mixture import Mixture
from olmo_train.data.order import BatchSizes
from olmo_train.errors import BothSet, ConfigError, nearest_key
from olmo_train.eval.config import EvalConfig
from olmo_train.formats import counted
from olmo_train.guards.config import GuardConfig
from olmo_train.log.config import LogConfig, ProfileConfig
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import block_matrices, count_parameters
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.schedules import lr_at
from olmo_train.parallel.config import ParallelConfig
from olmo_train.storage import FilePath

if TYPE_CHECKING:
    BatchSize: TypeAlias = Any  # an int once __post_init__ has run
else:
    BatchSize = Count | None
SHORT_NAMES = {int: "int", float: "float", bool: "bool", str: "text", FilePath: "path", type(None): "null"}


@dataclass(frozen=True)
class BatchConfig:
    """A row of batch_schedule."""

    from_step: Count  # the first step of this size
    size: Count  # instances per step, over all processes


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run. The defaults are OLMo-7B's recipe; only run_dir and data.sources must be set."""

    run_dir: FilePath  # folder for everything that the run writes
    data: DataConfig
    seed: Natural = 6198  # of the weights, and of the data order unless data.seed is set
    total_steps: Count | None = None  # length of the run in updates
    total_tokens: Positive | None = None  # length in tokens, instead of total_steps; if no length is set, 2e12 as OLMo
    # length in passes over the source of the largest weight, rounded up to a whole step; instead of total_steps
    total_epochs: Positive | None = None
    # instances per step, over all processes; null: that of the checkpoint, else by the number of parameters, 2048 for a 7B
    global_batch_size: BatchSize = None
    # a batch that changes, instead of global_batch_size: [{from_step: 1, size: 64}, {from_step: 500, size: 128}]
    batch_schedule: tuple[BatchConfig, ...] = ()
    # most instances per forward pass of one process; changes memory and speed, not what is learned
    micro_batch_size: Count = 4
    # tokens by whose number loss and gradients are divided; all_tokens: also unscored ones, to follow a run of OLMo exactly
    loss_divisor: Literal["scored_tokens", "all_tokens"] = "scored_tokens"
    # run: the same bits each time; world: also on any number of processes, with one instance per forward pass
    determinism: Literal["none", "run", "world"] = "none"
    # auto: from the newest checkpoint that verifies; strict: refuse when the newest one does not
    resume: Literal["auto", "strict"] = "auto"
    resume_from: FilePath | None = None  # start a new run_dir from this checkpoint of any run: weights, optimizer and step
    init_from: FilePath | None = None  # start a new run_dir at step 0 from the weights of this checkpoint; the base of adapters
    allow_changes: tuple[str, ...] = ()  # dotted keys that may differ from those of the resumed checkpoint
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    batch_is_unset: ClassVar[bool] = False  # of an object: global_batch_size was null, and __post_init__ chose it

    def __post_init__(self) -> None:
        if self.batch_schedule:
            self._check_batch_schedule()
        elif self.global_batch_size is None:
            object.__setattr__(self, "global_batch_size", batch_for(self.model))
            object.__setattr__(self, "batch_is_unset", True)
        if self.optim.lr_batch_scaling != "none":
            self._scale_lr()
        parallel = self.parallel
        if self.determinism != "none" and parallel.compile is None:  # on a GPU the compiler may time kernels, and choose others
            object.__setattr__(self, "parallel", replace(parallel, compile=False))
        if self.determinism == "world" and (parallel.compile or parallel.float8 or parallel.reduce_dtype != "fp32"):
            raise ConfigError(
                "determinism", "'world' sums gradients in fp64, uncompiled; leave out parallel.compile, float8 and reduce_dtype"
            )
        check_adapter(self)
        if self.resume_from and self.init_from and not self.adapter.is_on:
            what = f"{self.init_from} and resume_from {self.resume_from} are both set; leave one out, as resume_from=null"
            raise BothSet("init_from", what, "resume_from")
        lengths = ((name, getattr(self, name)) for name in ("total_steps", "total_tokens", "total_epochs"))
        chosen = [(name, value) for name, value in lengths if value is not None]
        if len(chosen) > 1:
            (first, value), (second, other) = chosen[:2]
            shown = value if isinstance(value, int) else f"{value:g}"
            what = f"{other:g} and {first} {shown} are both set; leave one out, as {first}=null"
            raise BothSet(second, what, first)
        if self.total_epochs is not None:
            return  # the number of steps depends on the data; see with_length
        in_steps = optim_in_steps(self, self.batches)
        if in_steps.schedule != "constant" and in_steps.warmup_steps >= self.steps and self.total_steps is None:
            raise ConfigError("optim.warmup_steps", "; ".join(self.warmup_too_long))

    def _check_batch_schedule(self) -> None:
        """Raises ConfigError when batch_schedule is not a list of rising steps, or stands beside global_batch_size."""
        if self.global_batch_size is not None:
            what = f"and global_batch_size {self.global_batch_size} are both set; leave one out, as global_batch_size=null"
            raise BothSet("batch_schedule", what, "global_batch_size")
        starts = [row.from_step for row in self.batch_schedule]
        if starts[0] != 1 or starts != sorted(set(starts)):
            raise ConfigError("batch_schedule", f"must start at step 1 and rise, got from_step {starts}")

    def _scale_lr(self) -> None:
        """Set the factors of optim.lr_batch_scaling. Raises ConfigError without a batch_schedule."""
        if not self.batch_schedule:
            what = f"{self.optim.lr_batch_scaling} is read with batch_schedule only; leave it out"
            raise ConfigError("optim.lr_batch_scaling", what)
        first, optim = self.batch_schedule[0].size, replace(self.optim)
        factors = tuple((row.from_step, math.sqrt(row.size / first)) for row in self.batch_schedule)
        object.__setattr__(optim, "lr_factors", factors)
        object.__setattr__(self, "optim", optim)

    @property
    def batches(self) -> BatchSizes:
        """The sizes of the global batches of a run that starts with this configuration."""
        return BatchSizes(tuple((row.from_step, row.size) for row in self.batch_schedule) or ((1, self.global_batch_size),))

    @property
    def warmup_too_long(self) -> tuple[str, str]:
        """What is wrong with a warmup that fills the run, and the remedy."""
        what = f"{optim_in_steps(self, self.batches).warmup_steps} fills the whole run of {counted(self.steps, 'step')}"
        return f"{what}: the learning rate never reaches its peak", f"set optim.warmup_steps to at most {self.steps - 1}"

    @property
    def steps(self) -> int:
        """Number of updates in the run."""
        return self.steps_with(self.batches)

    def steps_with(self, batches: BatchSizes) -> int:
        """Number of updates in the run with these batch sizes."""
        assert self.total_epochs is None, "with_length comes first"
        if self.total_steps is not None:
            return self.total_steps
        return batches.steps_for(self.total_tokens or 2e12, self.model.seq_len)

    def with_length(self, mixture: Mixture) -> TrainConfig:
        """This configuration with total_epochs as total_tokens, which follow from the opened data. Raises ConfigError."""
        if self.total_epochs is None:
            return self
        tokens = mixture.places_of_epochs(self.total_epochs) * self.model.seq_len
        return replace(self, total_epochs=None, total_tokens=tokens)

    def in_steps(self, batches: BatchSizes | None = None) -> TrainConfig:
        """This configuration with every length in steps, for a run with these batch sizes, or its own. with_length comes first.
        Raises ConfigError."""
        batches = batches or self.batches
        return replace(self, total_steps=self.steps_with(batches), total_tokens=None, optim=optim_in_steps(self, batches))

    def tokens_by(self, step: int) -> int:
        """Tokens read by the end of this step."""
        return self.batches.places_before(step + 1) * self.model.seq_len

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a global batch; with a batch_schedule their mean over the run."""
        return self.tokens_by(self.steps) / self.steps if self.batch_schedule else self.tokens_by(1)

    def mixture(self, changes: Iterable[Sequence[int]] = ()) -> Mixture:
        """The data, opened, read in batches of these sizes (see BatchSizes), or of global_batch_size. Raises DataError when a
        source cannot be read or is too small."""
        batches = BatchSizes.of(changes) if changes else self.batches
        mixture = Mixture(self.data, self.seed, batches.at(1), self.model.seq_len, self.model.vocab_size)
        if batches != mixture.batches:
            mixture.set_batches(batches)
        return mixture

    def check_world(self, size: int, after: float = 0) -> None:
        """Raises ConfigError when a global batch after step `after` cannot be divided among `size` processes."""
        ends = [first - 1 for first, _ in self.batches.changes[1:]] + [math.inf]
        for row, (batch, end) in enumerate(zip(self.batches.sizes, ends, strict=True)):
            if end >= after + 1 and batch % size:
                below = batch // size * size
                fix = f"{below} or {below + size}" if below else size
                key = f"batch_schedule.{row}.size" if self.batch_schedule else "global_batch_size"
                raise ConfigError(key, f"{batch} is not a multiple of the {counted(size, 'process')}; use {fix}")

    def rows_on(self, size: int) -> list[int]:
        """Instances of a global batch on one of `size` processes, for each global batch that they can divide."""
        return [batch // size for batch in self.batches.sizes if batch % size == 0] or [max(1, self.batches.sizes[-1] // size)]

    def micro_batch_on(self, size: int) -> int:
        """Instances per forward pass on one of `size` processes: the largest divisor of its rows up to micro_batch_size."""
        rows = math.gcd(*self.rows_on(size))
        return max(n for n in range(1, min(self.micro_batch_size, rows) + 1) if rows % n == 0)

    def batch_notes(self, size: int) -> list[str]:
        """Lines about the batch sizes that a run on `size` processes chooses itself."""
        rows, micro, notes = self.rows_on(size), self.micro_batch_on(size), []
        if self.batch_is_unset:
            notes.append(
                f"global_batch_size is not set: {counted(self.global_batch_size, 'instance')}, "
                f"{self.tokens_per_step:,} tokens per step, for a model of {count_parameters(self.model).total:,} parameters"
            )
        if micro < self.micro_batch_size:
            instances = f"{''.join(f'{n} and ' for n in sorted(set(rows))[:-1])}{counted(max(rows), 'instance')}"
            notes.append(
                f"micro_batch_size {self.micro_batch_size} is lowered to {micro}, which divides the {instances} of a process"
            )
        return notes


def batch_for(model: ModelConfig) -> int:
    """The global batch size, in instances, for a model whose configuration sets none: OLMo-7B's 2048 x 2048 tokens times
    (parameters / OLMo-7B's)^0.65, to the nearest power of two.

    The exponent is that of DeepSeek LLM (Bi et al. 2024, section 3.1): the best batch grows with compute^0.3271, and the
    compute of a run whose tokens grow with its parameters grows with parameters^2. See docs/decisions/0010.
    """
    olmo, tokens = ModelConfig(), 2048 * 2048
    share = count_parameters(model).total / count_parameters(olmo).total
    return 2 ** max(0, round(math.log2(tokens * share ** (2 * 0.3271) / model.seq_len)))


def check_adapter(config: TrainConfig) -> None:
    """Raises ConfigError when the adapters do not fit the model or another section."""
    adapter, shapes = config.adapter, block_matrices(config.model)
    if not adapter.is_on:
        return
    if config.parallel.float8:
        raise ConfigError("parallel.float8", f"computes no frozen weights beside adapters; leave it out with {adapter.kind}")
    if config.optim.name != "adamw":
        what = f"{config.optim.name} would orthogonalize the updates of A and B apart, which is not that of their product"
        raise ConfigError("optim.name", f"{what}; set adamw with adapter.kind {adapter.kind}")
    targets = [name for name in adapter.targets if name in shapes]
    if not targets:
        what = f"{', '.join(adapter.targets)} is in no block of this model, whose MLP has no gate"
        raise ConfigError("adapter.targets", f"{what}; name some of {', '.join(shapes)}")
    smallest = min(targets, key=lambda name: min(shapes[name]))
    if adapter.rank > min(shapes[smallest]):
        rows, columns = shapes[smallest]
        what = f"{adapter.rank} is above the smallest side of {smallest}, which is {rows} x {columns}"
        raise ConfigError("adapter.rank", f"{what}; set at most {min(rows, columns)}")


def optim_in_steps(config: TrainConfig, batches: BatchSizes) -> OptimConfig:
    """The optim section with its lengths in steps. A warmup ends at the first step after which its tokens have been read; a
    decay begins at the last step after which at least its tokens remain to be read. Raises ConfigError."""
    optim, seq_len = config.optim, config.model.seq_len
    warmup, end, decay = optim.warmup_steps, optim.schedule_steps, optim.decay_steps
    if optim.warmup_tokens is not None:
        warmup = batches.steps_for(optim.warmup_tokens, seq_len)
    if optim.schedule_tokens is not None:
        end = batches.steps_for(optim.schedule_tokens, seq_len)
    last = end or config.steps_with(batches)
    if optim.decay_tokens is not None:
        decay = batches.steps_before(last, optim.decay_tokens, seq_len)
    if decay is not None and decay > last - warmup:
        name, length = ("tokens", optim.decay_tokens) if optim.decay_tokens else ("steps", decay)
        room = f"the {counted(max(last - warmup, 0), 'step')} between the warmup and the end of the schedule"
        raise ConfigError(f"optim.decay_{name}", f"{length:g} is longer than {room}; set it lower, or train longer")
    lengths = {"warmup_steps": warmup, "schedule_steps": end, "decay_steps": decay}
    return replace(optim, **lengths, warmup_tokens=None, schedule_tokens=None, decay_tokens=None)


def schedule_warnings(config: TrainConfig, saved: dict[str, Any], mixture: Mixture, last_step: int) -> list[str]:
    """A warning if the learning rate jumps after `last_step`, since the run was lengthened.

    `saved`: the configuration of the checkpoint that is resumed.
    """
    was = build(TrainConfig, saved).with_length(mixture).in_steps(mixture.batches)
    steps = was.steps
    before, after = lr_at(last_step, was.optim, steps), lr_at(last_step + 1, config.optim, config.steps)
    if abs(after - lr_at(last_step + 1, was.optim, steps)) <= 0.1 * before:
        return []
    return [
        f"the learning rate jumps from {before:.3g} at step {last_step} to {after:.3g} at step {last_step + 1}: the run "
        f"had {steps} steps when it was saved and has {config.steps} now; to keep the schedule: "
        f"optim.schedule_steps={was.optim.schedule_steps or steps} allow_changes=[optim.schedule_steps]"
    ]


class Key(NamedTuple):
    """A key of the configuration, as documentation."""

    name: str  # dotted; NAME stands for any name, N for a place in a list
    kind: str  # its type, choices and range
    default: str  # as one types it; ??? for a key that must be set
    meaning: str  # the comment beside or above the field


def keys() -> Iterator[Key]:
    """Every key of the configuration, in the order of the fields."""
    source = functools.cache(inspect.getsource)
    for name, cls, key, hint in walk(TrainConfig):
        default = key.default if key.default_factory is MISSING else key.default_factory()
        comments = rf"((?:^    # .+\n)*)^    {key.name}: .*?(  # .+)?$"
        above, beside = re.search(comments, source(cls), re.MULTILINE).groups()
        yield Key(name, _kind(hint), _typed(default), " ".join((beside or above).replace("# ", "").split()))


def find_keys(prefix: str) -> list[Key]:
    """The keys that start with `prefix`. Raises ConfigError, with near ones, when there are none."""
    known = list(keys())
    if found := [key for key in known if key.name.startswith(prefix)]:
        return found
    raise ConfigError("--keys", f"no key starts with '{prefix}'; {nearest_key(prefix, [key.name for key in known])}")


def _typed(value: Any) -> str:
    if value is MISSING:
        return "???"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _kind(hint: Any) -> str:
    """A type as `train --keys` prints it, such as `int, at least 1 | null`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ", ".join([_kind(args[0]), *(rule.text for rule in args[1:])])
    if origin is Literal:
        return " | ".join(args)
    if origin in (Union, types.UnionType):
        return " | ".join(map(_kind, args))
    if origin is tuple:
        return f"list of {_kind(args[0])}"
    if origin is dict:
        return f"{{NAME: {_kind(args[1])}}}"
    if is_dataclass(hint):
        return f"{{{', '.join(key.name for key in fields(hint))}}}"
    return SHORT_NAMES[hint]

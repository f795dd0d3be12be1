"""The `optim` section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from olmo_train.config import Count, Fraction, Natural, NonNegative, Positive, Rule, names_in
from olmo_train.errors import BothSet, ConfigError

FOLDER = Path(__file__).parent
if TYPE_CHECKING:
    Optimizer: TypeAlias = str
    Schedule: TypeAlias = str
    DecayShape: TypeAlias = str
else:  # the names of the rows, read without importing torch
    Optimizer = Literal[names_in("OPTIMIZERS", FOLDER / "build.py")]
    Schedule = Literal[names_in("SCHEDULES", FOLDER / "schedules.py")]
    DecayShape = Literal[names_in("DECAY_SHAPES", FOLDER / "schedules.py")]
Clip = Annotated[float, Rule("above 0; .inf clips nothing", lambda norm: norm > 0)]


@dataclass(frozen=True)
class OptimConfig:
    """Defaults are OLMo-7B's (Groeneveld et al. 2024, table 2). build.py has the optimizers, schedules.py the schedules."""

    name: Optimizer = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the other parameters
    peak_lr: NonNegative = 3e-4  # learning rate at the end of the warmup
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)  # decay rates of AdamW's running means of the gradient and its square
    eps: NonNegative = 1e-5  # added to sqrt(v) after bias correction
    weight_decay: NonNegative = 0.1  # decoupled; multiplied by the learning rate
    decay_embeddings: bool = False  # also decay the embedding; OLMo decays Linear weights only, OLMo-0424 and OLMo2 decay all
    decay_norms: bool = False  # also decay the weights of norms
    muon_momentum: Fraction = 0.95  # momentum of muon, for the matrices of the blocks
    max_grad_norm: Clip = 1.0  # clip gradients to this global L2 norm
    grad_clip_warmup_steps: Natural = 0  # for N steps from the second, max_grad_norm is multiplied by the factor below
    grad_clip_warmup_factor: NonNegative = 1.0  # factor of grad_clip_warmup_steps; OLMo-7B has 1000 steps and 10.0
    # learning rate after the warmup; linear, cosine: decay to final_lr_ratio; inverse_sqrt: peak * sqrt(warmup / step); wsd: the
    # peak, then a decay of decay_shape over the last decay_steps
    schedule: Schedule = "linear"
    warmup_steps: Natural = 5000  # steps of linear warmup
    warmup_tokens: Positive | None = None  # length of the warmup in tokens, instead of warmup_steps
    warmup_start_ratio: NonNegative = 0.1  # the warmup starts at this fraction of the peak, as in OLMo, not at zero
    final_lr_ratio: NonNegative = 0.1  # the last learning rate, as a fraction of the peak
    schedule_steps: Count | None = None  # the step at which the schedule ends; null: the last step of the run
    schedule_tokens: Positive | None = None  # the same in tokens, instead of schedule_steps
    decay_steps: Count | None = None  # length of the final decay of wsd; null: a tenth of the schedule
    decay_tokens: Positive | None = None  # the same in tokens, instead of decay_steps
    # of the final decay of wsd; linear: a straight line; 1-sqrt: by 1 - sqrt(share of the decay), which falls faster at first
    decay_shape: DecayShape = "linear"
    # sqrt: multiply the learning rate by sqrt(batch / first batch) where batch_schedule changes the batch
    lr_batch_scaling: Literal["none", "sqrt"] = "none"

    # Of an object: (first step, factor of the learning rate), with lr_batch_scaling; TrainConfig sets it.
    lr_factors: ClassVar[tuple[tuple[int, float], ...]] = ()

    def __post_init__(self) -> None:
        for name in ("warmup", "schedule", "decay"):
            self._check_one_length(f"{name}_tokens", f"{name}_steps")
        for name in ("decay_steps", "decay_tokens", "decay_shape"):
            if getattr(self, name) != getattr(OptimConfig, name) and self.schedule != "wsd":
                raise ConfigError(f"optim.{name}", f"is read with schedule: wsd only, not {self.schedule}; leave it out")
        if self.schedule_steps is not None and self.schedule_steps < self.warmup_steps:
            raise ConfigError("optim.schedule_steps", f"{self.schedule_steps} is below warmup_steps {self.warmup_steps}")

    def _check_one_length(self, tokens: str, steps: str) -> None:
        """Raises BothSet when a length is set in tokens and in steps."""
        length, other = getattr(self, tokens), getattr(self, steps)
        if length is not None and other != getattr(OptimConfig, steps):
            what = f"{length:g} and optim.{steps} {other} are both set; leave one out"
            raise BothSet(f"optim.{tokens}", what, f"optim.{steps}")


# ---- Muon


NEWTON_SCHULZ_STEPS = 5  # Jordan et al. 2024
ROUND_ELEMENTS = 2**22  # elements of full matrices that a rank orthogonalizes at a time, or one larger matrix


def newton_schulz_flops(rows: int, columns: int) -> int:
    """FLOPs of orthogonalizing one matrix: in each iteration two products with the m x n matrix and one of m x m, m <= n."""
    m, n = min(rows, columns), max(rows, columns)
    return NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3)

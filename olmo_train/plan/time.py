"""Time, money, energy and carbon of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from olmo_train.checkpoint.config import CheckpointConfig
from olmo_train.deal import deal
from olmo_train.hardware import Hardware
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import FULL, block_matrices, flops_per_token
from olmo_train.optim.config import newton_schulz_flops
from olmo_train.plan.memory import Layout

PAPER_PUE = 1.1  # Groeneveld et al. 2024, section 5 (power and carbon): data-centre power over GPU power
PAPER_CARBON = 0.610  # kgCO2eq/kWh, ibid., for the run on A100s


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot compute."""

    mfu: float = 0.4  # fraction of the peak
    price: float | None = None  # of a GPU-hour, in any currency
    pue: float = PAPER_PUE
    carbon: float = PAPER_CARBON  # kgCO2eq/kWh


@dataclass(frozen=True)
class RunCost:
    """The cost of a run; `money` is None without a price."""

    flops: float
    seconds: float
    gpu_hours: float
    tokens_per_second: float  # all GPUs
    gpu_kwh: float  # at the GPUs' full power
    kwh: float  # with the data centre's share
    co2_kg: float
    money: float | None


def update_flops(model: ModelConfig, layout: Layout) -> int:
    """FLOPs of one update on the busiest GPU that flops_per_token does not count: the orthogonalizations of Muon, which deals
    the matrices over all GPUs; 0 with AdamW."""
    if layout.optimizer != "muon":
        return 0
    costs = [newton_schulz_flops(*shape) for shape in block_matrices(model).values()] * model.n_layers
    loads = [0] * layout.gpus
    for cost, owner in zip(costs, deal(costs, layout.gpus), strict=True):
        loads[owner] += cost
    return max(loads)


def run_cost(
    model: ModelConfig,
    tokens: float,
    gpus: int,
    hardware: Hardware,
    assumed: Assumptions,
    update_flops: float = 0.0,
    adapter: AdapterConfig = FULL,
) -> RunCost:
    """Time from FLOPs and an assumed MFU; energy and carbon as the OLMo paper counts them: power x PUE x intensity.
    Evaluation, saving and restarts are not included. `update_flops`: of one GPU in all updates of the run."""
    flops = tokens * flops_per_token(model, adapter=adapter)
    return cost_of(flops, tokens, gpus, hardware, assumed, update_flops)


def cost_of(
    flops: float, tokens: float, gpus: int, hardware: Hardware, assumed: Assumptions, update_flops: float = 0.0
) -> RunCost:
    """The same of a run whose FLOPs are known."""
    seconds = (flops / gpus + update_flops) / (hardware.peak_flops * assumed.mfu)
    tokens_per_second = tokens / seconds
    gpu_hours = gpus * seconds / 3600
    gpu_kwh = gpu_hours * hardware.power_watts / 1000
    return RunCost(
        flops=flops,
        seconds=seconds,
        gpu_hours=gpu_hours,
        tokens_per_second=tokens_per_second,
        gpu_kwh=gpu_kwh,
        kwh=gpu_kwh * assumed.pue,
        co2_kg=co2_kg(gpu_kwh, assumed.pue, assumed.carbon),
        money=None if assumed.price is None else gpu_hours * assumed.price,
    )


def co2_kg(gpu_kwh: float, pue: float = PAPER_PUE, carbon: float = PAPER_CARBON) -> float:
    """kgCO2eq of energy measured at the GPUs: 70 t for the paper's 104 MWh on A100s."""
    return gpu_kwh * pue * carbon


def checkpoint_counts(total_steps: int, config: CheckpointConfig) -> tuple[int, int]:
    """(checkpoints that a run saves, those that exist at its end)."""
    every, forever = config.interval_steps, config.permanent_interval_steps
    named = {step for step in config.save_steps if 1 <= step <= total_steps and not (forever and step % forever == 0)}
    permanent = len(named) + (total_steps // forever if forever else 0)
    passing = total_steps // every - (total_steps // math.lcm(every, forever) if forever else 0)
    passing -= sum(step % every == 0 for step in named)
    passing += total_steps % every != 0 and not config.is_permanent(total_steps)  # the last step
    return permanent + passing, permanent + min(passing, config.keep_last)


def milestones(total_steps: int, *others: int) -> list[int]:
    """Steps at which a schedule is worth reading: the first, the end of the warmup, each tenth, the last."""
    tenths = {round(Fraction(total_steps * tenth, 10)) for tenth in range(1, 11)}
    return sorted(step for step in {1, *others, *tenths} if 1 <= step <= total_steps)

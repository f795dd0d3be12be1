"""The optimizers and the learning rate. A schedule is a pure function of the step: lr_at(step, config, total_steps)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from olmo_train.errors import ConfigError, check_choice


@dataclass(frozen=True)
class OptimConfig:
    """Defaults are OLMo-7B's (Groeneveld et al. 2024, table 2)."""

    name: str = "adamw"
    peak_lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5  # added to sqrt(v) after bias correction
    weight_decay: float = 0.1  # per step, times the learning rate
    decay_embeddings: bool = False  # OLMo decays Linear weights only; 0424 and later decay embeddings and norms too
    decay_norms: bool = False
    muon_momentum: float = 0.95  # read by muon, for the matrices of the blocks
    max_grad_norm: float = 1.0  # global L2 norm
    grad_clip_warmup_steps: int = 0  # for so many steps, counted from the second, the norm may be ...
    grad_clip_warmup_factor: float = 1.0  # ... this many times larger: OLMo-7B 1000 steps and 10.0
    schedule: str = "linear"
    warmup_steps: int = 5000
    warmup_start_ratio: float = 0.1  # the warmup starts at this share of the peak, not at zero, as OLMo does
    final_lr_ratio: float = 0.1  # the last learning rate, as a share of the peak
    schedule_steps: int | None = None  # at which the schedule ends; null: with the run
    decay_steps: int | None = None  # read by wsd: the length of the last, falling part; null: a tenth of the run

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZERS)
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        for key in ("peak_lr", "eps", "weight_decay", "warmup_steps", "warmup_start_ratio", "final_lr_ratio",
                    "grad_clip_warmup_steps", "grad_clip_warmup_factor"):  # fmt: skip
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"optim.{key}", f"must be a finite number and not negative, got {getattr(self, key)}")
        if not self.max_grad_norm > 0:
            raise ConfigError("optim.max_grad_norm", f"must be above 0, got {self.max_grad_norm}; .inf clips nothing")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optim.betas", f"must lie in [0, 1), got {list(self.betas)}")
        if not 0 <= self.muon_momentum < 1:
            raise ConfigError("optim.muon_momentum", f"must lie in [0, 1), got {self.muon_momentum}")
        if self.schedule_steps is not None and self.schedule_steps < max(1, self.warmup_steps):
            raise ConfigError("optim.schedule_steps", f"{self.schedule_steps} is below warmup_steps {self.warmup_steps}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ConfigError("optim.decay_steps", f"is read by schedule: wsd only, and the schedule is {self.schedule}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ConfigError("optim.decay_steps", f"must be at least 1, got {self.decay_steps}")


def lr_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of update `step`, counted from 1.

    Warmup as OLMo (allenai/OLMo, olmo/optim.py): linear from warmup_start_ratio * peak_lr at step 0 to peak_lr at
    warmup_steps; afterwards the schedule, which ends at final_lr_ratio * peak_lr.
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    if step < warmup:
        start = config.warmup_start_ratio * peak
        return start + (peak - start) * step / warmup
    return SCHEDULES[config.schedule](step, config, config.schedule_steps or total_steps)


def max_grad_norm_at(step: int, config: OptimConfig) -> float:
    """The norm that update `step` is clipped to. As in OLMo, which sets it after it has clipped, the first update is
    clipped to the plain norm, and the warmup ends one step late."""
    return config.max_grad_norm * (config.grad_clip_warmup_factor if 1 < step <= config.grad_clip_warmup_steps + 1 else 1.0)


def linear(step: int, config: OptimConfig, total_steps: int) -> float:
    """A straight line from the peak to the final learning rate; golden values are OLMo's to the last bit."""
    peak, final = config.peak_lr, config.final_lr_ratio * config.peak_lr
    if step >= total_steps:
        return final
    return peak - (peak - final) * ((step - config.warmup_steps) / (total_steps - config.warmup_steps))


def cosine(step: int, config: OptimConfig, total_steps: int) -> float:
    """Half a cosine from the peak to the final learning rate."""
    peak, final = config.peak_lr, config.final_lr_ratio * config.peak_lr
    if step >= total_steps:
        return final
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def constant(step: int, config: OptimConfig, total_steps: int) -> float:
    return config.peak_lr


def inverse_sqrt(step: int, config: OptimConfig, total_steps: int) -> float:
    """peak * sqrt(warmup / step) (Vaswani et al. 2017), not below the final learning rate."""
    warmup = max(config.warmup_steps, 1)
    return max(config.peak_lr * math.sqrt(warmup / max(step, warmup)), config.final_lr_ratio * config.peak_lr)


def wsd(step: int, config: OptimConfig, total_steps: int) -> float:
    """Warmup, stable, decay (Hu et al. 2024): the peak, then a straight line over the last decay_steps."""
    decay = -(-total_steps // 10) if config.decay_steps is None else config.decay_steps
    peak, final = config.peak_lr, config.final_lr_ratio * config.peak_lr
    remaining = max(total_steps - step, 0)
    return peak if remaining >= decay else final + (peak - final) * remaining / decay


SCHEDULES = {"linear": linear, "cosine": cosine, "constant": constant, "inverse_sqrt": inverse_sqrt, "wsd": wsd}


@dataclass(frozen=True)
class Group:
    """What the optimizer does alike for all parameters of a group."""

    decay: bool  # whether weight decay applies
    lr_scale: float = 1.0  # times the learning rate of the schedule


def group_of(name: str, shape: tuple[int, ...], config: OptimConfig) -> Group:
    """The group of the parameter called `name`. A tied head is the embedding, so it is decayed only if embeddings are."""
    if name == "embed.weight":
        return Group(config.decay_embeddings)
    return Group(config.decay_norms if "norm" in name else True)


def param_groups(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> list[dict]:
    """torch's parameter groups of {name: parameter}."""
    groups: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(group_of(name, tuple(parameter.shape), config), []).append(parameter)
    return [
        {"params": params, "weight_decay": config.weight_decay * group.decay, "lr_scale": group.lr_scale}
        for group, params in groups.items()
    ]


# f(whole matrix) of a tensor that may be sharded, sharded likewise; here: of one that is not. See parallel.on_whole.
OnWhole = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def on_plain(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return function(tensor)


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, on_whole: OnWhole = on_plain, exactly: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over {name: parameter}, frozen ones left out; group_of says which are decayed.

    `exactly`: the bits of an update do not depend on how a parameter is sharded.
    """
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    return OPTIMIZERS[config.name](parameters, config, on_whole, ExactAdamW if exactly else torch.optim.AdamW)


def adamw(
    parameters: Mapping[str, nn.Parameter],
    config: OptimConfig,
    on_whole: OnWhole = on_plain,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> torch.optim.AdamW:
    """torch's fused AdamW. Its `found_inf` makes a step an exact no-op without a host sync (see guards.py)."""
    return kind(param_groups(parameters, config), lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


def muon(parameters: Mapping[str, nn.Parameter], config: OptimConfig, on_whole: OnWhole, kind: type[torch.optim.AdamW]) -> Muon:
    """Muon for the matrices of the blocks, AdamW for embedding, head and norms."""
    matrices = {name: p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    return Muon(param_groups(matrices, config), adamw(rest, config, kind=kind), config, on_whole)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


class ExactAdamW(torch.optim.AdamW):
    """AdamW in single operations, each of which rounds once. The fused kernel multiplies and adds in one rounding or in two,
    by an element's place in its shard, so that its last bit depends on the sharding."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict) -> None:
        state, (beta1, beta2), gradient = self.state[parameter], group["betas"], parameter.grad
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        skipped = torch.zeros_like(state["step"]) if self.found_inf is None else self.found_inf  # type: ignore[attr-defined]
        count = (state["step"] + 1).double()
        mean = (state["exp_avg"] * beta1).add_(gradient * (1 - beta1))
        square = (state["exp_avg_sq"] * beta2).add_(gradient.square().mul_(1 - beta2))
        correction1, correction2 = ((1 - beta**count).float() for beta in (beta1, beta2))
        update = (mean / correction1).div_((square / correction2).sqrt_().add_(group["eps"])).mul_(group["lr"])
        stepped = (parameter * (1 - group["lr"] * group["weight_decay"])).sub_(update)
        for kept, new in ((state["exp_avg"], mean), (state["exp_avg_sq"], square), (parameter, stepped)):
            kept.copy_(torch.where(skipped > 0, kept, new))
        state["step"] += 1 - skipped


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) on whole matrices, however they are sharded, and AdamW for the rest.

    Each matrix is gathered while its momentum is orthogonalized, on every rank; the momentum itself stays sharded. The
    update is scaled to the size of AdamW's (Liu et al. 2025), so that both share learning rate and weight decay. Like
    torch's fused AdamW it reads `found_inf`, and a step with 1.0 there is an exact no-op without a host sync.
    """

    def __init__(self, matrices: list[dict], rest: torch.optim.AdamW, config: OptimConfig, on_whole: OnWhole):
        super().__init__(matrices, lr=config.peak_lr, momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw")
        self.matrices, self.rest, self.on_whole = list(self.param_groups), rest, on_whole
        self.param_groups += rest.param_groups  # one list, so that set_lr and zero_grad reach all
        rest.state = self.state  # one table too: what a checkpoint keeps
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.matrices:
            for parameter in group["params"]:
                self._step_matrix(parameter, group)
        self.rest.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.rest.step()

    def _step_matrix(self, parameter: nn.Parameter, group: dict) -> None:
        """The arithmetic of torch.optim.Muon but for fp32 throughout, on copies that are kept unless the step is skipped."""
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        skipped = torch.zeros_like(state["step"]) if self.found_inf is None else self.found_inf
        # Multiplied and added apart: in one operation the last bit depends on an element's place in its shard.
        buffer = (state["momentum_buffer"] * momentum).add_(parameter.grad * (1 - momentum))
        update = (parameter.grad * (1 - momentum)).add_(buffer * momentum) if group["nesterov"] else buffer
        update = self.on_whole(orthogonalize, update)
        lr = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
        stepped = (parameter * (1 - group["lr"] * group["weight_decay"])).sub_(update * lr)
        for kept, new in ((state["momentum_buffer"], buffer), (parameter, stepped)):
            kept.copy_(torch.where(skipped > 0, kept, new))
        state["step"] += 1 - skipped


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1, by five quintic Newton-Schulz iterations (Jordan et al. 2024, with
    their coefficients). In fp32: in bf16, as torch has it, the rounding of sums over ranks grows to 1e-2 of the update."""
    a, b, c = 3.4445, -4.775, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state as before the first step, so that it can be loaded into, and so that memory is
    complete from the start. Weights are left as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    set_lr(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    # An exact no-op, which allocates all the same.
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

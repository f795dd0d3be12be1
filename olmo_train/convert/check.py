"""Compare logits of our model and of transformers', block by block, so that neither is in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from olmo_train.convert import families
from olmo_train.convert.folders import Read, TheirWeights, on_meta, transformers
from olmo_train.errors import CheckpointError, check_choice
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import FULL

MAX_DIFFERENCE = 2e-5  # between logits of size 1, computed in fp32; with gate and up swapped it is 1 and more
MAX_RELATIVE = 5e-6  # |difference| / |logits|, over all of them
WITH_ADAPTERS = 2.0  # times both limits between adapted and merged weights, which sum in another order


@dataclass(frozen=True)
class Agreement:
    """How near the logits of the copy are to those of the original, on the same tokens."""

    difference: float  # the largest
    relative: float
    largest: float  # logit
    n_layers: int
    looser: float = 1.0  # times both limits
    lost: float | None = None  # relative difference by which rounding moved logits away from those of the adapted model

    @property
    def holds(self) -> bool:
        deep = max(1.0, self.n_layers / 8) ** 0.5  # rounding adds up over layers: measured 1.3e-6 at 3 and 2.0e-6 at 9
        limit = self.looser * deep
        return self.difference <= MAX_DIFFERENCE * limit * max(1.0, self.largest) and self.relative <= MAX_RELATIVE * limit

    def __str__(self) -> str:
        lost = "" if self.lost is None else f"; rounding moved them from those of the adapted model by {self.lost:.1e}, relative"
        return f"logits differ by at most {self.difference:.1e}, relative {self.relative:.1e}{lost}"


def compare(ours: Tensor, theirs: Tensor, config: ModelConfig, looser: float = 1.0) -> Agreement:
    """How near two models' logits (B, T, V) are; `theirs` are the original's or, of an export, the copy's."""
    difference = (ours - theirs).abs()
    relative = (difference.norm() / theirs.norm()).item()
    return Agreement(difference.max().item(), relative, theirs.abs().max().item(), config.n_layers, looser)


def require(agreement: Agreement, source: Path) -> Agreement:
    """The agreement, if it holds. Raises CheckpointError about `source`, which is being converted, if not."""
    if not agreement.holds:
        limits = f"{agreement.looser * MAX_DIFFERENCE:g} and {agreement.looser * MAX_RELATIVE:g}"
        raise CheckpointError(source, f"was not converted: {agreement}, more than {limits}")
    return agreement


def check_logits(config: ModelConfig, read: Read, folder: Path, source: Path, adapter: AdapterConfig = FULL) -> Agreement:
    """Compare our logits of our weights with transformers' logits of its `folder`, on the same tokens, in fp32. With an `adapter`
    ours are those of the frozen weights and adapters, not merged.

    Raises CheckpointError about `source`, which is being converted, when they do not agree.
    """
    weights = TheirWeights(folder)
    settings = transformers().AutoConfig.from_pretrained(folder)
    theirs = their_logits(config, settings, lambda name: weights(name).float())
    looser = WITH_ADAPTERS if adapter.is_on else 1.0
    return require(compare(our_logits(config, read, adapter), theirs, config, looser), source)


def _tokens(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, min(64, config.seq_len)), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(config: ModelConfig, read: Read, adapter: AdapterConfig = FULL) -> Tensor:
    """Logits (B, T, V) of our model, with adapters if `adapter` has any, which `read` reads as well."""
    model = on_meta(config, adapter).eval()
    load_when_needed(model, model.blocks, read)
    return model(_tokens(config))


@torch.no_grad()
def their_logits(config: ModelConfig, settings: Any, read: Read) -> Tensor:
    """Logits of transformers' model of its configuration `settings`, whose weights `read` reads by their names."""
    check_choice("model_type", settings.model_type, families.FAMILIES)
    with _parameters_on_meta():
        model = getattr(transformers(), families.FAMILIES[settings.model_type].architecture)(settings).eval()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == settings.num_hidden_layers)
    load_when_needed(model, layers, read)
    model.tie_weights()
    return model(_tokens(config), use_cache=False).logits.float()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device, and their buffers, which are computed, are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def load_when_needed(model: nn.Module, blocks: nn.ModuleList, read: Read) -> None:
    """Give a model on the meta device its weights: each block only while it computes, the other layers for good."""
    prefix = next(name for name, module in model.named_modules() if module is blocks)

    def fill(module: nn.Module, names: list[str], prefix: str = "") -> None:
        module.load_state_dict({name: read(prefix + name) for name in names}, strict=False, assign=True)

    def empty(block: nn.Module, args: tuple, output: object) -> None:
        block.to("meta")

    fill(model, [name for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.")])  # a tied one has one name
    for i, block in enumerate(blocks):
        names = [name for name, _ in block.named_parameters()]
        block.register_forward_pre_hook(lambda block, args, i=i, names=names: fill(block, names, f"{prefix}.{i}."))
        block.register_forward_hook(empty)

"""Compare logits of our model and of transformers', block by block, so that neither is in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from olmo_train.convert import families
from olmo_train.convert.folders import Read, TheirWeights, on_meta, transformers
from olmo_train.errors import CheckpointError, check_choice
from olmo_train.model.config import ModelConfig

MAX_DIFFERENCE = 2e-5  # between logits of size 1, computed in fp32; with gate and up swapped it is 1 and more
MAX_RELATIVE = 5e-6  # |difference| / |logits|, over all of them


@dataclass(frozen=True)
class Agreement:
    """How near the logits of the copy are to those of the original, on the same tokens."""

    difference: float  # the largest
    relative: float
    largest: float  # logit
    n_layers: int

    @property
    def holds(self) -> bool:
        deep = max(1.0, self.n_layers / 8) ** 0.5  # rounding adds up over layers: measured 1.3e-6 at 3 and 2.0e-6 at 9
        is_near = self.difference <= MAX_DIFFERENCE * deep * max(1.0, self.largest)
        return is_near and self.relative <= MAX_RELATIVE * deep

    def __str__(self) -> str:
        return f"logits differ by at most {self.difference:.1e}, relative {self.relative:.1e}"


@torch.no_grad()
def check_logits(config: ModelConfig, read: Read, folder: Path, source: Path) -> Agreement:
    """Compare our logits of our weights with transformers' logits of its `folder`, on the same tokens, in fp32.

    Raises CheckpointError about `source`, which is being converted, when they do not agree.
    """
    tokens = torch.randint(config.vocab_size, (2, min(64, config.seq_len)), generator=torch.Generator().manual_seed(1))
    model = on_meta(config).eval()
    load_when_needed(model, model.blocks, read)
    theirs = _their_logits(folder, tokens)
    difference = (model(tokens) - theirs).abs()
    relative = (difference.norm() / theirs.norm()).item()
    agreement = Agreement(difference.max().item(), relative, theirs.abs().max().item(), config.n_layers)
    if not agreement.holds:
        raise CheckpointError(source, f"was not converted: {agreement}, more than {MAX_DIFFERENCE:g} and {MAX_RELATIVE:g}")
    return agreement


def _their_logits(folder: Path, tokens: Tensor) -> Tensor:
    library = transformers()
    settings = library.AutoConfig.from_pretrained(folder)
    check_choice("model_type", settings.model_type, families.FAMILIES)
    with _parameters_on_meta():
        model = getattr(library, families.FAMILIES[settings.model_type].architecture)(settings).eval()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == settings.num_hidden_layers)
    weights = TheirWeights(folder)
    load_when_needed(model, layers, lambda name: weights(name).float())
    model.tie_weights()
    return model(tokens, use_cache=False).logits.float()


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

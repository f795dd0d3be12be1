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
from olmo_train.convert.folders import Read, TheirWeights, _on_meta, transformers
from olmo_train.errors import CheckpointError, check_choice
from olmo_train.model.config import ModelConfig

MAX_DIFFERENCE = 2e-5  # between logits of size 1, computed in fp32; gate and up swapped give 1 and more
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


def _require(agreement: Agreement, source: Path) -> None:
    if not agreement.holds:
        raise CheckpointError(source, f"was not converted: {agreement}, more than {MAX_DIFFERENCE:g} and {MAX_RELATIVE:g}")


# ---- proof


def compare(config: ModelConfig, read: Read, folder: Path) -> Agreement:
    """Our logits of our weights beside transformers' of its folder: on the same tokens, in fp32, in evaluation mode."""
    tokens = torch.randint(config.vocab_size, (2, min(64, config.seq_len)), generator=torch.Generator().manual_seed(1))
    ours = _our_logits(config, read, tokens)
    theirs = _their_logits(folder, tokens)
    difference = (ours - theirs).abs()
    return Agreement(
        difference.max().item(), (difference.norm() / theirs.norm()).item(), theirs.abs().max().item(), config.n_layers
    )


def _our_logits(config: ModelConfig, read: Read, tokens: Tensor) -> Tensor:
    model = _on_meta(config).eval()
    with torch.no_grad(), _weights_when_needed(model, model.blocks, read):
        return model(tokens)


def _their_logits(folder: Path, tokens: Tensor) -> Tensor:
    library = transformers()
    settings = library.AutoConfig.from_pretrained(folder)
    check_choice("model_type", settings.model_type, families.FAMILIES)
    with _parameters_on_meta():
        model = getattr(library, families.FAMILIES[settings.model_type].architecture)(settings).eval()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == settings.num_hidden_layers)
    weights = TheirWeights(folder)
    with torch.no_grad(), _weights_when_needed(model, layers, lambda name: weights(name).float()):
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


@contextmanager
def _weights_when_needed(model: nn.Module, blocks: nn.ModuleList, read: Read) -> Iterator[None]:
    """A model on the meta device that can run: each block has its weights while it computes, the rest have them always."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one has one name
    in_blocks = {id(module) for block in blocks for module in block.modules()}
    meta = {module: dict(module._parameters) for module in model.modules()}
    values: dict[str, nn.Parameter] = {}

    def fill(modules: Iterator[nn.Module]) -> None:
        for module in modules:
            for key, parameter in meta[module].items():
                if parameter is not None:
                    name = names[id(parameter)]
                    if name not in values:
                        values[name] = nn.Parameter(read(name), requires_grad=False)
                    module._parameters[key] = values[name]
        values.clear()

    def empty(block: nn.Module) -> None:
        for module in block.modules():
            module._parameters.update(meta[module])

    fill(module for module in model.modules() if id(module) not in in_blocks)
    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda block, args: fill(block.modules())))
        hooks.append(block.register_forward_hook(lambda block, args, output: empty(block)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

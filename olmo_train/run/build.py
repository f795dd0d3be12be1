"""Build the model and the optimizer of a run: sharded, with first weights or those of a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from olmo_train.checkpoint import load
from olmo_train.formats import counted
from olmo_train.model.adapter import adapt
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer
from olmo_train.optim.build import allocate_state, build_optimizer
from olmo_train.optim.groups import Scaling
from olmo_train.parallel import shard
from olmo_train.parallel.determinism import DETERMINISM
from olmo_train.parallel.exchange import on_full_tensors
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig

log = logging.getLogger(__name__)


def build(
    config: TrainConfig, world: World, checkpoint: Path | None, init_folder: Path | None = None
) -> tuple[Transformer, torch.optim.Optimizer]:
    """The sharded model and its optimizer: with the state of `checkpoint`, else the weights of the checkpoint `init_folder`,
    else first weights. Both folders are verified. With adapters `init_folder` is the base, whose weights stay frozen, and
    `checkpoint` holds the adapters."""
    with torch.device("meta"):
        model = Transformer(config.model)
        if config.adapter.is_on:
            adapt(model, config.adapter)
    determinism = DETERMINISM[config.determinism]
    shard.shard(model, config.parallel, world, determinism, max(config.batches.sizes))
    parameters = dict(model.named_parameters())
    scaling = scaling_of(config.model, config.adapter.lr_ratio)
    optimizer = build_optimizer(parameters, config.optim, determinism.adamw, world.mesh.size(), on_full_tensors, scaling)
    allocate_state(optimizer)
    if init_folder:
        load.load_weights(init_folder, model, world)
    if checkpoint:
        load.load(checkpoint, model, optimizer, world)
    elif config.adapter.is_on:
        zeros = shard.init_adapters(model, config.seed)
        if zeros and world.is_main:
            what = f"{counted(zeros, 'row')} of the adapted weights {'is' if zeros == 1 else 'are'} zero"
            log.warning("%s: DoRA's m / |V| is 1 there as long as B A is zero too", what)
    elif not init_folder:
        shard.init_weights(model, config.seed)
    return model, optimizer


def scaling_of(model: ModelConfig, lr_ratio: float = 1.0) -> Scaling:
    """What the parametrization of a model, and LoRA+'s ratio, mean for the learning rates."""
    return Scaling(lr_ratio, model.width_ratio, model.depth_ratio, model.parametrization == "completep")

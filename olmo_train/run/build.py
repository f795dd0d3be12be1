"""Build the model and the optimizer of a run: sharded, with first weights or those of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from olmo_train.checkpoint import load
from olmo_train.model.transformer import Transformer
from olmo_train.optim.build import allocate_state, build_optimizer
from olmo_train.parallel import shard
from olmo_train.parallel.determinism import DETERMINISM
from olmo_train.parallel.exchange import on_full_tensors
from olmo_train.parallel.world import World
from olmo_train.train_config import TrainConfig


def build(
    config: TrainConfig, world: World, checkpoint: Path | None, init_folder: Path | None = None
) -> tuple[Transformer, torch.optim.Optimizer]:
    """The sharded model and its optimizer: with the state of `checkpoint`, else the weights of the checkpoint `init_folder`,
    else first weights. Both folders are verified."""
    with torch.device("meta"):
        model = Transformer(config.model)
    determinism = DETERMINISM[config.determinism]
    shard.shard(model, config.parallel, world, determinism, config.global_batch_size)
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, config.optim, determinism.adamw, world.mesh.size(), on_full_tensors)
    allocate_state(optimizer)
    if checkpoint:
        load.load(checkpoint, model, optimizer, world)
    elif init_folder:
        load.load_weights(init_folder, model, world)
    else:
        shard.init_weights(model, config.seed)
    return model, optimizer

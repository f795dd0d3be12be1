"""Shard a model with FSDP2 and apply precision, recomputation and compilation, from outside the model.

There is one code path: `fully_shard` is applied on one CPU process as on 256 GPUs. Weights, reduced gradients and optimizer
state are fp32; blocks compute in `precision`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from olmo_train.deal import deal, in_rounds
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import kernels
from olmo_train.parallel.config import ParallelConfig
from olmo_train.parallel.determinism import DETERMINISM, Determinism, round_gradients
from olmo_train.parallel.exchange import to_shards
from olmo_train.parallel.recompute import training_forward
from olmo_train.parallel.world import World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shard(
    model: Transformer,
    config: ParallelConfig,
    world: World,
    determinism: Determinism = DETERMINISM["none"],
    global_batch_size: int = 1,
) -> Transformer:
    """Prepare a model on the meta device for training in this world, in place: its parameters become DTensors on the
    device, with no values yet. Parameter names do not change.

    `global_batch_size` is the number of sequences whose gradients are summed, for the range of rounded gradients.
    """
    compiled = kernels.is_compiled(config, world.device)
    kernels.select_kernels(model, config, world.device)
    for block in model.blocks:
        block.forward = training_forward(block.forward, config.activation_checkpointing, compiled)
    # Activations between blocks already have the right precision; casting inputs would round the fp32 RoPE tables.
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.precision],
        reduce_dtype=determinism.reduce_dtype or DTYPES[config.reduce_dtype],
        cast_forward_inputs=False,
    )
    # A single rank holds all fp32 weights anyway; freeing the bf16 copies would only make it cast them again.
    keeps_weights = config.shard == "grad_op" or world.mesh.size(world.mesh.ndim - 1) == 1
    for module in [*model.blocks, model]:
        # The backward begins with the head, where the forward ends: freed in between, the head would be gathered again at once.
        frees = not keeps_weights and module is not model
        fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=frees)
        if world.mesh.size() > 1:  # else FSDP would divide by one, in a pass over all gradients
            # FSDP averages gradients over ranks; the loss is already divided by the tokens of the global batch, so sum them.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if determinism.reduce_dtype:
            round_gradients(module, functools.partial(_own_parameters, module), global_batch_size)
    model.keeps_weights, model.is_compiled = keeps_weights, compiled
    return model.to_empty(device=world.device)


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that `fully_shard` gathers for this module and not for one of its blocks."""
    return [parameter for name, parameter in module.named_parameters() if not name.startswith("blocks.")]


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Set the first value of every parameter, sharded or not; equal for every world size.

    Each is drawn on one rank, which sends the shards to the others: the ranks have equal shares of the elements.
    """
    named = list(model.named_parameters())
    sizes = [parameter.numel() for _, parameter in named]
    mesh = getattr(named[0][1], "device_mesh", None)
    rank, ranks = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
    owners = deal(sizes, ranks)
    for pieces in in_rounds(sizes, owners, most=1):  # one tensor a rank at a time
        drawn = [named[i] for i in pieces if owners[i] == rank]
        values = [initial_value(name, p.shape, model.config, seed).to(p.device) for name, p in drawn]
        parameters = [named[i][1] for i in pieces]
        for parameter, value in zip(parameters, to_shards(values, parameters, [owners[i] for i in pieces]), strict=True):
            parameter.copy_(value)


def reshard(model: nn.Module) -> None:
    """Free weights that a forward gathered and no backward freed: parameters are this rank's shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

"""Shard a model with FSDP2 and apply precision, recomputation and compilation, from outside the model.

There is one code path: `fully_shard` is applied on one CPU process as on 256 GPUs. Weights, reduced gradients and optimizer
state are fp32; blocks compute in `precision`, in which frozen weights are kept too.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from olmo_train.deal import deal, in_rounds
from olmo_train.model.adapter import adapted_linears, first_values, is_adapter
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import kernels
from olmo_train.parallel.config import ParallelConfig
from olmo_train.parallel.determinism import DETERMINISM, Determinism, round_gradients
from olmo_train.parallel.exchange import place_in, to_shards
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
    kernels.select_kernels(model, config, world.device, compiled)
    for block in model.blocks:
        block.forward = training_forward(block.forward, config.activation_checkpointing, compiled)
    if adapted := any(is_adapter(name) for name, _ in model.named_parameters()):
        _freeze_in(model, DTYPES[config.precision])
    # Activations between blocks already have the right precision; casting inputs would round the fp32 RoPE tables.
    policy = MixedPrecisionPolicy(
        # Frozen weights are in the precision of compute, and adapters, which are cast where they are used, in fp32.
        param_dtype=None if adapted else DTYPES[config.precision],
        reduce_dtype=determinism.reduce_dtype or DTYPES[config.reduce_dtype],
        cast_forward_inputs=False,
    )
    # A single rank holds all fp32 weights anyway; freeing the bf16 copies would only make it cast them again.
    keeps_weights = config.shard == "grad_op" or world.mesh.size(world.mesh.ndim - 1) == 1
    units = gathered_units(model)
    for unit in reversed(units):  # the model after its blocks
        # The backward begins with the head, where the forward ends: freed in between, the head would be gathered again at once.
        frees = not keeps_weights and unit[0] not in (model, model.norm)
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=frees)
        if determinism.reduce_dtype:
            round_gradients(unit[0], functools.partial(_own_parameters, unit), global_batch_size)
    if not isinstance(model, FSDPModule):
        fully_shard(model, mesh=world.mesh, mp_policy=policy)  # has no weights left, but coordinates the units
        model.embed.set_unshard_in_backward(False)  # the gradient of an embedding does not depend on its weights
        # By default torch would prefetch what ran before: the head of the previous micro-batch. This gathers nothing.
        model.embed.set_modules_to_backward_prefetch([model.embed])
    for (first, *_), (second, *_) in itertools.pairwise(units):
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])
    if world.mesh.size() > 1:  # else FSDP would divide by one, in a pass over all gradients
        for module, *_ in units:
            # FSDP averages gradients over ranks; the loss is already divided by the tokens of the global batch, so sum them.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.keeps_weights, model.is_compiled = keeps_weights, compiled
    return model.to_empty(device=world.device)


def _freeze_in(model: Transformer, dtype: torch.dtype) -> None:
    """Keep the frozen weights in this type: without updates they need no fp32 master."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def gathered_units(model: Transformer) -> list[list[Any]]:
    """The modules whose weights are gathered, and whose gradients are reduced, at once, in the order of the forward. A tied
    matrix is needed at both ends, so the model gathers it with the final norm."""
    blocks = [[block] for block in model.blocks]
    return [[model], *blocks] if model.head is None else [[model.embed], *blocks, [model.norm, model.head]]


def _own_parameters(unit: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters that `fully_shard` gathers for this unit."""
    named = [item for module in unit for item in module.named_parameters()]
    return [parameter for name, parameter in named if not name.startswith("blocks.")]


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Set the first value of every parameter, sharded or not; equal for every world size.

    Each is drawn on one rank, which sends the shards to the others: the ranks have equal shares of the elements.
    """
    named = list(model.named_parameters())
    sizes = [parameter.numel() for _, parameter in named]
    mesh = getattr(named[0][1], "device_mesh", None)
    rank, ranks, _ = place_in(mesh) if mesh else (0, 1, 1)
    owners = deal(sizes, ranks)
    for pieces in in_rounds(sizes, owners, most=1):  # one tensor a rank at a time
        drawn = [named[i] for i in pieces if owners[i] == rank]
        values = [initial_value(name, p.shape, model.config, seed).to(p.device) for name, p in drawn]
        parameters = [named[i][1] for i in pieces]
        for parameter, value in zip(parameters, to_shards(values, parameters, [owners[i] for i in pieces]), strict=True):
            parameter.copy_(value)


@torch.no_grad()
def init_adapters(model: Transformer, seed: int) -> int:
    """Set the first values of all adapters beside frozen weights that have their values; equal for every world size. Returns the
    number of rows of zeros in the weights that DoRA adapts; these are gathered, one at a time, on every rank."""
    zeros = 0
    for name, module in adapted_linears(model):
        weight = module.weight
        if module.adapter.magnitude is not None:  # it begins as the norms of the rows
            weight = full_tensor(weight)
            zeros += int((weight == 0).all(dim=1).sum())
        for key, value in first_values(name, module, weight, seed).items():
            parameter = getattr(module.adapter, key)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
    return zeros


def reshard(model: nn.Module) -> None:
    """Free weights that a forward gathered and no backward freed: parameters are this rank's shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

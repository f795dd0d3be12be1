"""Everything that is done to a model from outside: sharding, precision, recomputation, compilation, gradient clipping.

One code path: FSDP2 (`fully_shard`) is applied on one CPU process as on 256 GPUs. Weights, gradients that are reduced and
optimizer state are fp32; what is computed inside a block is in `precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.parallel import determinism, kernels
from olmo_train.parallel.config import ParallelConfig
from olmo_train.parallel.recompute import DEAR, RECOMPUTED
from olmo_train.parallel.world import World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEAR |= {f"aten._scaled_dot_product_{kind}_attention.default" for kind in ("flash", "efficient", "cudnn")}
DEAR |= {"aten._scaled_dot_product_flash_attention_for_cpu.default"}


def shard(model: Transformer, config: ParallelConfig, world: World, exact_rows: int | None = None) -> Transformer:
    """Prepare a model on the meta device for training in this world, in place: its parameters become DTensors on the
    device, whose values are not set yet. The names of parameters stay as they are.

    With `exact_rows`, the sequences of the global batch, their gradients add up to the same bits in any order, as long as
    each goes through the model alone (exact.py).
    """
    kernels.choose(model, world.device, config.cpu_kernels, config.compile, config.float8)
    for block in model.blocks:
        if config.activation_checkpointing != "none":
            block.forward = functools.partial(RECOMPUTED[config.activation_checkpointing], block.forward)
        if config.compile:
            block.compile()
    # What is handed from block to block has its precision already; a cast of inputs would round the fp32 tables of RoPE.
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.precision],
        reduce_dtype=torch.float64 if exact_rows else DTYPES[config.reduce_dtype],
        cast_forward_inputs=False,
    )
    # One rank holds all fp32 weights anyway: dropping the copies that it computes with would only make it cast them again.
    keeps_weights = config.shard == "grad_op" or world.mesh.size(world.mesh.ndim - 1) == 1
    for module in [*model.blocks, model]:
        # The backward begins where the forward ends, with the head: freed in between, it would be gathered again at once.
        frees = not keeps_weights and module is not model
        fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=frees)
        if world.mesh.size() > 1:  # else FSDP would divide by one, in a pass over all gradients
            # FSDP averages gradients over ranks; the loss is already divided by the global batch's tokens, so take the sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if exact_rows:
            determinism.round_gradients(module, functools.partial(_own_parameters, module), exact_rows)
    model.keeps_weights = keeps_weights
    return model.to_empty(device=world.device)


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that `fully_shard` gathers for this module, and not for one of its blocks."""
    return [parameter for name, parameter in module.named_parameters() if not name.startswith("blocks.")]


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Give every parameter, whole or sharded, its first value; equal for every world size."""
    for name, parameter in model.named_parameters():
        value = initial_value(name, parameter.shape, model.config, seed)
        if isinstance(parameter, DTensor):  # every rank has drawn the whole value, so nothing needs to be sent
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def reshard(model: nn.Module) -> None:
    """Free what a forward has gathered and no backward has freed, so that the parameters are this rank's shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which every rank may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_whole(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """function(the whole tensor), computed on every rank and sharded like `tensor` again."""
    if not isinstance(tensor, DTensor):
        return function(tensor)
    result = function(tensor.full_tensor())
    return distribute_tensor(result, tensor.device_mesh, tensor.placements, src_data_rank=None)

"""Everything that is done to a model from outside: sharding, precision, recomputation, compilation, gradient clipping.

One code path: FSDP2 (`fully_shard`) is applied on one CPU process as on 256 GPUs. Weights, gradients that are reduced and
optimizer state are fp32; what is computed inside a block is in `precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from olmo_train import exact, kernels
from olmo_train.distributed import World
from olmo_train.errors import ConfigError, check_choice
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Whose outputs `selective` keeps, by name, as some exist only once they are used: products, and every kind of attention.
DEAR = {"aten.mm.default", "aten._scaled_mm.default", "flex_attention", "olmo_train.cpu_attention.default"}
DEAR |= {f"aten._scaled_dot_product_{kind}_attention.default" for kind in ("flash", "efficient", "cudnn")}
DEAR |= {"aten._scaled_dot_product_flash_attention_for_cpu.default"}


def keep_dear(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Products and attention are most of the compute and the lesser part of the memory; the rest is soon computed again."""
    return CheckpointPolicy.MUST_SAVE if str(operation) in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


# Nothing in a block draws random numbers, so there is no state of a generator to set back.
_recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
RECOMPUTED = {
    "selective": functools.partial(_recomputed, context_fn=functools.partial(create_selective_checkpoint_contexts, keep_dear)),
    "full": _recomputed,
}


@dataclass(frozen=True)
class ParallelConfig:
    shard: str = "full"  # full: ZeRO-3, weights are gathered block by block; grad_op: ZeRO-2, kept whole until the step ends
    replicas: int = 1  # whole copies of the sharded state (HSDP)
    precision: str = "bf16"  # of compute: bf16 or fp32; weights and optimizer state are always fp32
    reduce_dtype: str = "fp32"  # in which gradients are summed over ranks
    activation_checkpointing: str = "none"  # selective: keep what products and attention give, compute the rest again; full: all
    compile: bool = False  # torch.compile each block
    float8: bool = False  # products inside the blocks in float8, scaled by tensor (torchao); a CPU only emulates them
    cpu_kernels: bool | None = None  # attention and loss on a CPU by our own C++; null: where a compiler for it is found

    def __post_init__(self) -> None:
        check_choice("parallel.shard", self.shard, ("full", "grad_op"))
        check_choice("parallel.precision", self.precision, DTYPES)
        check_choice("parallel.reduce_dtype", self.reduce_dtype, DTYPES)
        check_choice("parallel.activation_checkpointing", self.activation_checkpointing, ("none", *RECOMPUTED))
        if self.replicas < 1:
            raise ConfigError("parallel.replicas", f"must be at least 1, got {self.replicas}")


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
            exact.round_gradients(module, functools.partial(_own_parameters, module), exact_rows)
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


def last_micro_batch(model: nn.Module, last: bool) -> None:
    """Gradients are summed over ranks with the last micro-batch only; those before it add up on each rank. Weights that
    stay whole during the forward stay so until then."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(last or not model.keeps_weights)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)


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


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, exactly: bool = False) -> tuple[Tensor, tuple[list[str], Tensor]]:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; no host sync.

    Returns the norm before, fp32, and the names of the parameters that have a gradient with the norm of each: a DTensor, of
    which every rank has its part until `whole` reduces it, so that it costs nothing when nobody asks.

    The coefficient is min(1, max_norm / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_ and OLMo. It is applied
    to a non-finite norm too: such a step is skipped as a whole. `exactly`: its bits do not depend on the sharding.
    """
    names, gradients = zip(*((name, p.grad) for name, p in model.named_parameters() if p.grad is not None), strict=True)
    if exactly:
        norm, norms = exact_norm(gradients)
    else:
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = whole(torch.linalg.vector_norm(norms))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm, (list(names), norms)


@torch.no_grad()
def exact_norm(gradients: Sequence[DTensor]) -> tuple[Tensor, Tensor]:
    """The global L2 norm of sharded gradients and, (gradients,), that of each, fp32: infinite when one is not finite.

    Squares are added as integers, scaled for each tensor by its largest element so that their sum fits in 63 bits.
    """
    local = [
        gradient.to_local().double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) for gradient in gradients
    ]
    largest = _over_ranks(torch.stack([g.abs().max() if g.numel() else g.new_zeros(()) for g in local]), gradients[0], "max")
    scale = largest.frexp().exponent.double().exp2()  # (tensors,): largest < scale
    units = [2.0 ** (62 - gradient.numel().bit_length()) for gradient in gradients]
    parts = [((g / s).square() * unit).round().long().sum() for g, s, unit in zip(local, scale, units, strict=True)]
    total = _over_ranks(torch.stack(parts), gradients[0], "sum")
    squares = total.double() / torch.tensor(units, dtype=torch.float64, device=total.device) * scale.square()
    norm = torch.where(largest.isfinite().all(), squares.sum().sqrt(), torch.inf)
    return norm.float(), torch.where(largest.isfinite(), squares.sqrt(), torch.inf).float()


def _over_ranks(values: Tensor, like: DTensor, operation: str) -> Tensor:
    """Values of this rank's shards, reduced over the ranks that hold the other shards."""
    placements = [Partial(operation) if isinstance(placement, Shard) else Replicate() for placement in like.placements]
    return DTensor.from_local(values, like.device_mesh, placements, run_check=False).full_tensor()

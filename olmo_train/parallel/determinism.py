"""Sums that do not depend on the order of their terms, so that training has the same bits on any number of processes.

Floating-point addition is not associative, but it is exact as long as all terms are multiples of one quantum and the sum needs
no more bits than the format has. So each sequence goes through the model alone, its gradient is rounded to multiples of
QUANTUM, and the gradients are summed in fp64, over micro-batches and ranks in any order. The gradient norm, a sum over
elements, is computed in integers. See docs/decisions/0007.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from olmo_train.optim.adamw import DeterministicAdamW

# cuBLAS is deterministic with this workspace. It is read once, at the first matrix product of a process, so it is set before any
# run. On Hopper torch's workspaces have this size anyway, elsewhere they take 24 MB more.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DETERMINISTIC: Any = torch.utils.deterministic  # its flag is a property that type checkers do not see

# Gradients of one sequence, already divided by the tokens of the global batch: fp64 adds multiples of 2^-42 exactly up to
# 2^-42 x 2^53 = 2048.
QUANTUM = 2.0**-42
RANGE = 2.0**53 * QUANTUM
LOSS_QUANTUM = 2.0**-24  # nats; the summed loss of a sequence is a multiple of it anyway unless it is below 1


@contextlib.contextmanager
def deterministic_torch(threads: int | None = None) -> Iterator[None]:
    """Use torch's deterministic kernels, which are slower. An operation that has none raises a RuntimeError.

    Not with warn_only: attention would then keep cuDNN's kernel and the other non-deterministic backwards on a GPU.

    `threads`: of this process; None: as many as before.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, n_threads = DETERMINISTIC.fill_uninitialized_memory, torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    DETERMINISTIC.fill_uninitialized_memory = False  # costs time, and only helps to find uninitialized reads
    torch.set_num_threads(threads or n_threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        DETERMINISTIC.fill_uninitialized_memory = filled
        torch.set_num_threads(n_threads)


def loss_terms(losses: Tensor) -> Tensor:
    """Summed losses of sequences as fp64 terms that add up exactly in any order: multiples of LOSS_QUANTUM."""
    return (losses.double() / LOSS_QUANTUM).round() * LOSS_QUANTUM


def round_gradients(module: nn.Module, parameters: Callable[[], list[nn.Parameter]], sequences: int) -> None:
    """Round the gradients of `parameters()` to multiples of QUANTUM in every backward from now on. The parameters are looked up
    at the start of each forward of `module`.

    `sequences`: how many gradients are summed in a global batch. A gradient so large that the sum might be rounded becomes
    infinite, so that the step is skipped.
    """
    limit = RANGE / sequences
    known: dict[int, nn.Parameter] = {}

    def rounded(gradient: Tensor) -> Tensor:
        multiples = (gradient / QUANTUM).round() * QUANTUM  # powers of two, so exact in bf16 too
        return torch.where(gradient.abs() < limit, multiples, torch.inf)

    def begin(*_: object) -> None:
        for parameter in parameters():
            if parameter.requires_grad and id(parameter) not in known:
                known[id(parameter)] = parameter
                parameter.register_hook(rounded)

    module.register_forward_pre_hook(begin)


NormFunction = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]  # gradients -> the global L2 norm, the norm of each


def l2_norm(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The global L2 norm of gradients, fp32, and the norm of each, (gradients,): a DTensor if the gradients are sharded."""
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = torch.linalg.vector_norm(norms)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm, norms


@torch.no_grad()
def exact_norm(gradients: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The global L2 norm of sharded gradients, and the norm of each, (gradients,), fp32; infinite if a gradient is not finite.

    Squares are summed as integers, scaled for each tensor by its largest element so that the sum fits in 63 bits.
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
    """Reduce values of this rank's shards over the ranks that hold the other shards."""
    placements = [Partial(operation) if isinstance(placement, Shard) else Replicate() for placement in like.placements]
    return DTensor.from_local(values, like.device_mesh, placements, run_check=False).full_tensor()


@dataclass(frozen=True)
class Determinism:
    """What a value of the key `determinism` changes."""

    prepare: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext  # for the time of the run
    rows_per_forward: int | None = None  # sequences in one forward; None: micro_batch_size
    reduce_dtype: torch.dtype | None = None  # round gradients and sum them in this type; None: sum in parallel.reduce_dtype
    norm_function: NormFunction = l2_norm
    adamw: type[torch.optim.AdamW] = torch.optim.AdamW


# run: the same command on the same machine computes the same bits; a CPU needs no flags for it. world: also on any number of
# processes, on one thread each, because splitting a matrix product over threads can change its rounding.
DETERMINISM = {
    "none": Determinism(),
    "run": Determinism(deterministic_torch),
    "world": Determinism(
        prepare=functools.partial(deterministic_torch, threads=1),
        rows_per_forward=1,
        reduce_dtype=torch.float64,
        norm_function=exact_norm,
        adamw=DeterministicAdamW,
    ),
}

"""Sums that do not depend on the order of their terms, so that training has the same bits on any number of processes.

Floating-point addition is not associative, but it is exact as long as all terms are multiples of one quantum and the sum needs
no more bits than the format has. So each sequence goes through the model alone, its gradient is rounded to multiples of
QUANTUM, and the gradients are summed in fp64, over micro-batches and ranks in any order. The gradient norm, a sum over
elements, is computed in integers. See docs/decisions/0007.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

DETERMINISTIC: Any = torch.utils.deterministic  # its flag is a property that type checkers do not see

# Gradients of one sequence, already divided by the tokens of the global batch: fp64 adds multiples of 2^-42 exactly up to
# 2^-42 x 2^53 = 2048.
QUANTUM = 2.0**-42
RANGE = 2.0**53 * QUANTUM
LOSS_QUANTUM = 2.0**-24  # nats; the summed loss of a sequence is a multiple of it anyway unless it is below 1


@contextlib.contextmanager
def determinism(mode: str) -> Iterator[None]:
    """Set torch's flags for `none`, `run` or `world` while the run lasts.

    `run`: the same command on the same machine computes the same bits. A CPU needs no flags for it; on a GPU torch uses slower
    deterministic kernels where it has them and warns where it has none. `world`: also one thread, because splitting a matrix
    product over threads can change its rounding.
    """
    if mode == "none":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch.use_deterministic_algorithms asks for
    threads = torch.get_num_threads()
    before = torch.are_deterministic_algorithms_enabled(), DETERMINISTIC.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    DETERMINISTIC.fill_uninitialized_memory = False  # costs time, and only helps to find uninitialized reads
    torch.set_num_threads(1 if mode == "world" else threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        DETERMINISTIC.fill_uninitialized_memory = before[1]
        torch.set_num_threads(threads)


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

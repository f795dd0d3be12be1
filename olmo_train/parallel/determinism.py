"""Sums that do not depend on the order of their terms, so that training has the same bits on any number of processes.

The one idea: floating-point addition is not associative, but it is exact as long as all terms are multiples of one
quantum and the sum needs no more bits than the format has. So each sequence goes through the model alone, its gradient is
rounded to multiples of QUANTUM, and these are added in fp64: over micro-batches and over ranks, in whatever order. What
must be added over elements, the gradient norm, is added in integers. See docs/decisions/0007.
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
    """What `none`, `run` or `world` asks of torch, until the end of the run.

    `run`: the same command on the same machine gives the same bits. On a CPU it does without; on a GPU some operations have
    another, slower form for it, and those that have none are told in a warning. `world`: one thread besides, since how a
    product is cut for several may change its rounding.
    """
    if mode == "none":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch.use_deterministic_algorithms asks for
    threads = torch.get_num_threads()
    before = torch.are_deterministic_algorithms_enabled(), DETERMINISTIC.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    DETERMINISTIC.fill_uninitialized_memory = False  # costs time and finds bugs of another kind
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
    """From the next forward of `module` on, round the gradients that a backward gives to `parameters`, which are asked for
    when the forward begins, to multiples of QUANTUM.

    `sequences` of the global batch are added up; a gradient so large that their sum might not be exact becomes infinite,
    so that the step is skipped: never a sum that depends on the order.
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

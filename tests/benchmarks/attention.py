"""Attention on this machine's CPU, forward and backward: our kernels with what the processor multiplies bf16 by, the same without
matrix tiles (AMX) where it has them, and torch's. In turn within each round; medians over rounds, and errors against fp64.

    python tests/benchmarks/attention.py
    python tests/benchmarks/attention.py --shape 2,12,12,1024,64 --dtype bf16 --rounds 9 --documents 4
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_train.formats import counted
from olmo_train.hardware import cpuinfo
from olmo_train.model.transformer import document_mask, document_starts
from olmo_train.parallel import cpu_kernels

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def library(*flags: str) -> ctypes.CDLL:
    """Our kernels, built with these flags too."""
    usual, cpu_kernels.FLAGS = cpu_kernels.FLAGS, (*cpu_kernels.FLAGS, *flags)
    cpu_kernels.library.cache_clear()
    built = cpu_kernels.library()
    cpu_kernels.FLAGS = usual
    return built


def by_ours(built: ctypes.CDLL, starts: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cpu_kernels.library = lambda: built
    return cpu_kernels.attend(q, k, v, starts)


def by_torch(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])


def random_heads(shape: list[int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, stored as (B, T, heads, D) as in the model."""
    B, H, K, T, D = shape
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, D).to(dtype).transpose(1, 2) for heads in (H, K, K, H)]


def timed(attend: Attend, tensors: list[Tensor]) -> tuple[list[Tensor], float, float]:
    """The output and the gradients of q, k and v, and milliseconds of forward and backward."""
    *inputs, grad = [x.detach().requires_grad_() for x in tensors[:3]] + [tensors[3]]
    start = time.perf_counter()
    out = attend(*inputs)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(out, inputs, grad)
    return [out.detach(), *gradients], 1000 * (middle - start), 1000 * (time.perf_counter() - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2,12,12,1024,64", help="sequences, query heads, key heads, tokens, head size")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--documents", type=int, default=0, help="documents of equal length in a sequence; 0: no mask (default)")
    arguments = parser.parse_args()
    shape = [int(word) for word in arguments.shape.split(",")]
    tensors, T = random_heads(shape, DTYPES[arguments.dtype]), shape[3]
    starts = mask = None
    if arguments.documents:
        starts = document_starts((torch.arange(T) * arguments.documents // T).expand(shape[0], T))
        mask = document_mask(starts)

    ours = library()
    products = ours.bf16_products()
    kernels: dict[str, Attend] = {f"ours, {cpu_kernels.BF16_PRODUCTS[products]}": functools.partial(by_ours, ours, starts)}
    if products == 2:
        plain = library("-DTILES=0")
        name = f"ours, {cpu_kernels.BF16_PRODUCTS[plain.bf16_products()]}"
        kernels[name] = functools.partial(by_ours, plain, starts)
    kernels["torch"] = functools.partial(by_torch, mask)

    exact, *_ = timed(functools.partial(by_torch, mask), [x.double() for x in tensors])
    found = {name: timed(attend, tensors)[0] for name, attend in kernels.items()}  # the first calls are slower
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kernels}
    for number in range(arguments.rounds):
        for name in sorted(kernels, reverse=bool(number % 2)):
            times[name].append(timed(kernels[name], tensors)[1:])

    processor = next((line.split(": ")[1] for line in cpuinfo() if line.startswith("model name")), "unknown processor")
    masked = f", {counted(arguments.documents, 'document')}" if arguments.documents else ""
    print(f"{processor}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}")
    print(f"{shape}, {arguments.dtype}{masked}, {counted(arguments.rounds, 'round')}; errors: largest, and norm / norm\n")
    print(f"{'':<24}{'forward ms':>12}{'backward ms':>13}  {'output':>18}  {'dq':>18}  {'dk':>18}  {'dv':>18}")
    for name, pairs in times.items():
        forward, backward = (statistics.median(column) for column in zip(*pairs, strict=True))
        errors = [(got - true, true) for got, true in zip(found[name], exact, strict=True)]
        cells = "  ".join(f"{error.abs().max():>9.1e}{error.norm() / true.norm():>9.1e}" for error, true in errors)
        print(f"{name:<24}{forward:>12.2f}{backward:>13.2f}  {cells}")


if __name__ == "__main__":
    main()

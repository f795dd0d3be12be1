"""Attention and the head's loss for a CPU, from cpu_kernels.cpp, which a C++ compiler builds once per machine.

torch writes attention scores and vocabulary probabilities to memory in several passes. These kernels keep a few rows at a
time in the cache and compute in fp32, so results are at least as accurate as torch's in bf16. Causal attention follows Dao et
al. 2022 (FlashAttention): the backward recomputes the scores and normalizes them with the log-sum-exp saved by the forward.
Products of bf16 use AMX tiles or AVX-512's bf16 instructions where the processor has them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from olmo_train.errors import ConfigError, reason
from olmo_train.hardware import cpuinfo
from olmo_train.model.loss import IGNORE
from olmo_train.model.transformer import Mask, document_mask
from olmo_train.model.transformer import attend as attend_by_torch
from olmo_train.storage import cache_folder, replace_file, replacing

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")  # tried in this order, after $CXX
# Not -ffast-math: it assumes that there is no NaN, which the non-finite guard must see.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
DTYPES = (torch.bfloat16, torch.float32)
LANES = 16  # of the widest vector: head sizes must be multiples of it
BF16_PRODUCTS = ("fp32", "AVX-512 bf16", "AMX tiles")  # what the library makes products of bf16 with, by its number


# ---- building


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, built at the first use on a machine, in a few seconds.

    Raises ConfigError if there is no C++ compiler, or it fails.
    """
    words, built = _build_command()
    try:
        if not built.exists():
            _build(words, built)
        return ctypes.CDLL(str(built))
    except OSError as problem:
        what = f"cannot be built or loaded: {reason(problem)}; set XDG_CACHE_HOME to another folder, or set false"
        raise ConfigError("parallel.cpu_kernels", what) from None


def _build_command() -> tuple[list[str], Path]:
    """The words that call the compiler, and the library that they build. Raises ConfigError without a compiler."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        given = f", and CXX {compiler} is not found" if compiler else ""
        raise ConfigError(
            "parallel.cpu_kernels", f"needs a C++ compiler ({', '.join(COMPILERS)} or $CXX){given}; install one, or set false"
        )
    words = [*compiler.split(), *FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    return words, cache_folder() / "kernels" / f"{_fingerprint(words)}.so"


def _fingerprint(words: list[str]) -> str:
    """A hash of everything that the build depends on: machines with other processors and compilers may share a home."""
    about = [*words, SOURCE.read_text(encoding="utf-8"), platform.machine(), platform.processor()]
    about += sorted({line for line in cpuinfo() if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]


def _build(words: list[str], built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    with replacing(built) as made:  # several ranks may build at once, and each must find a complete file
        done = subprocess.run([*words, str(SOURCE), "-o", str(made)], capture_output=True, text=True, errors="replace")
        if done.returncode:
            complaint = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
            raise ConfigError("parallel.cpu_kernels", f"{' '.join(words)} failed: {complaint}; set CXX to another, or set false")


# ---- attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D), for q (B, H, T, D) and k, v (B, K, T, D), K a divisor of H.

    A query attends to keys up to its position; with `mask` (B, T) int64, as document_starts returns it, from that key on. Other
    masks, caches and other types, which these kernels lack, are left to torch.
    """
    has_starts = isinstance(mask, Tensor) and mask.dtype == torch.int64
    if (mask is None or has_starts) and q.dtype in DTYPES and q.shape[-1] % LANES == 0 and q.shape[2] == k.shape[2]:
        return attention(q, k, v, mask)[0]
    return attend_by_torch(q, k, v, document_mask(mask) if has_starts else mask)


def starts_as_mask(starts: Tensor) -> Tensor:
    """The mask of attention within documents that `attend` takes: their starts themselves, (B, T)."""
    return starts


@torch.library.custom_op("olmo_train::cpu_attention", mutates_args=(), device_types="cpu")
def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, D), and the log-sum-exp of each query's scores, fp32 (B, H, T). `starts` (B, T) int64: the first key
    that each query attends to, at most its own position, and never less than that of the query before."""
    q, k, v = map(_readable, (q, k, v))
    out, log_sums = _heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _call(False, q, k, starts, (q, k, v, out), log_sums)
    return out, log_sums


@torch.library.custom_op("olmo_train::cpu_attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from the gradient of the output."""
    grad, q, k, v = map(_readable, (grad, q, k, v))
    gradients = _heads_like(q), _heads_like(k), _heads_like(v)
    _call(True, q, k, starts, (grad, q, k, v, out, *gradients), log_sums)
    return gradients


def _call(is_backward: bool, q: Tensor, k: Tensor, starts: Tensor | None, tensors: tuple[Tensor, ...], log_sums: Tensor) -> None:
    B, H, T, D = q.shape
    shape, scale = (ctypes.c_int64 * 5)(B, H, k.shape[1], T, D), ctypes.c_float(D**-0.5)
    numbers = [number for x in tensors for number in (x.data_ptr(), *x.stride()[:3])]
    addresses = (ctypes.c_int64 * len(numbers))(*numbers)
    starts = None if starts is None else starts.contiguous()
    first_keys = ctypes.c_void_p(None) if starts is None else _pointer(starts)
    kinds = int(is_backward), int(q.dtype == torch.bfloat16)
    library().attention(*kinds, shape, scale, first_keys, addresses, _pointer(log_sums), torch.get_num_threads())


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_like(q), _heads_like(k), _heads_like(v)


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *attention_backward(grad, *ctx.saved_tensors), None


attention.register_autograd(_backward, setup_context=_keep)


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_like(x: Tensor) -> Tensor:
    """An empty (B, H, T, D) stored as (B, T, H, D), so that joining heads needs no copy."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


# ---- the choice between this attention and torch's

MEASURED_FLOPS = 2e8  # of attention, forward and backward: less takes about a millisecond, and is left to these kernels
MOST_FLOPS = 1e9  # of a measured call on each thread, so that all of them take a second
MOST_TOKENS = 2048
ROUNDS, ENOUGH_SECONDS = 5, 1.5  # of a measurement: fewer rounds, but one, on a machine that is slow or busy
GAIN = 1.05  # how many times as fast torch's has to be, so that chance does not choose it


@dataclass(frozen=True)
class AttentionShape:
    """What attention's speed depends on, beside the machine: shapes that agree in it are measured once."""

    dtype: str  # bf16 or fp32
    head_size: int
    group: int  # query heads of a key head
    tokens: int
    in_documents: bool
    threads: int

    @property
    def flops(self) -> float:
        """Of a forward and backward of one key head, over half of the scores: two and five products."""
        return 7.0 * self.group * self.tokens**2 * self.head_size

    def fitted(self) -> AttentionShape:
        """With a power of two of tokens, few enough for a short measurement."""
        tokens = 1 << (min(self.tokens, MOST_TOKENS) - 1).bit_length()
        while tokens > 256 and replace(self, tokens=tokens).flops > MOST_FLOPS:
            tokens //= 2
        return replace(self, tokens=tokens)


def attention_seconds(shape: AttentionShape) -> tuple[float, float] | None:
    """Seconds of this attention and of torch's, forward and backward, for one key head per thread: measured once per machine and
    kept beside the library. None where they cannot be kept, so that the choice could be another one next time."""
    numbers = "-".join(map(str, (shape.dtype, shape.head_size, shape.group, shape.tokens, shape.threads)))
    built = _build_command()[1]
    file = built.with_name(f"{built.stem}-{numbers}{'-documents' * shape.in_documents}-torch-{torch.__version__}.json")
    try:
        ours, torchs = json.loads(file.read_text(encoding="utf-8"))
        return float(ours), float(torchs)
    except (OSError, ValueError, TypeError):
        measured = time_attention(shape)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(measured).encode())
    except OSError:
        return None
    return measured


def torch_is_faster(shape: AttentionShape) -> bool:
    """Whether torch's attention is faster than this one on this machine."""
    seconds = attention_seconds(shape)
    return seconds is not None and seconds[0] > GAIN * seconds[1]


def time_attention(shape: AttentionShape) -> tuple[float, float]:
    """Medians of rounds of calls in turn."""
    dtype, generator = torch.bfloat16 if shape.dtype == "bf16" else torch.float32, torch.Generator().manual_seed(0)

    def heads(n: int) -> Tensor:
        x = torch.randn(1, shape.tokens, n * shape.threads, shape.head_size, generator=generator)
        return x.to(dtype).transpose(1, 2).requires_grad_()

    q, k, v, grad = heads(shape.group), heads(1), heads(1), heads(shape.group).detach()
    length = shape.tokens // 4  # of a document
    starts = (torch.arange(shape.tokens) // length * length)[None] if shape.in_documents else None
    masks = starts, None if starts is None else document_mask(starts)
    rounds: list[tuple[float, float]] = []
    started = time.perf_counter()
    with torch.enable_grad():
        while len(rounds) < 2 or (len(rounds) <= ROUNDS and time.perf_counter() - started < ENOUGH_SECONDS):
            clock = [time.perf_counter()]
            for attention_of, mask in zip((attend, attend_by_torch), masks, strict=True):
                torch.autograd.grad(attention_of(q, k, v, mask), (q, k, v), grad)
                clock.append(time.perf_counter())
            rounds.append((clock[1] - clock[0], clock[2] - clock[1]))
    ours, torchs = (statistics.median(times) for times in zip(*rounds[1:], strict=True))  # the first calls are slower
    return ours, torchs


# ---- loss


def differentiate_(logits: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    """Like loss.differentiate_: cross-entropy (N,) fp32; overwrites logits (N, V) with the gradients of the losses."""
    if logits.dtype not in DTYPES or not logits.is_contiguous():
        raise TypeError(f"logits must be contiguous, and bf16 or fp32, got {logits.dtype}")
    rows, vocab = logits.shape
    labels, losses = labels.contiguous(), logits.new_empty(rows, dtype=torch.float32)
    sizes = int(logits.dtype == torch.bfloat16), ctypes.c_int64(rows), ctypes.c_int64(vocab)
    numbers = _pointer(logits), _pointer(labels), ctypes.c_int64(IGNORE), ctypes.c_float(z_loss)
    if not library().differentiate(*sizes, *numbers, _pointer(losses), torch.get_num_threads()):
        raise IndexError(f"labels must be below {vocab}, or {IGNORE}")
    return losses

"""Select the implementations of attention, loss and matrix products by device, once, from outside the model.

On a CPU, attention and loss are our C++ kernels if they can be built. On a GPU, attention is torch's, which chooses between
cuDNN and FlashAttention 2, and the loss is compiled with the blocks.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from olmo_train.errors import ConfigError
from olmo_train.model.loss import differentiate_at_once_
from olmo_train.model.transformer import Attention, Transformer
from olmo_train.parallel.config import CpuKernels, ParallelConfig

if TYPE_CHECKING:
    from olmo_train.parallel.cpu_kernels import AttentionShape
    from olmo_train.train_config import TrainConfig

FLOAT8_MULTIPLE = 16  # sizes of a float8 matrix product must be multiples (cuBLAS)


def select_kernels(model: Transformer, config: ParallelConfig, device: torch.device, compiled: bool) -> None:
    """Set the implementations that the keys of `parallel` select, in place. `compiled`: as is_compiled returns. Raises
    ConfigError if one is not available here."""
    if has_cpu_kernels(config.cpu_kernels, device):
        from olmo_train.parallel.cpu_kernels import attend, differentiate_, starts_as_mask

        model.loss.differentiate_ = differentiate_
        if config.cpu_kernels != "loss":
            model.document_mask = starts_as_mask
            for block in model.blocks:
                block.attn.attend = attend
    if device.type == "cuda" and compiled:
        model.loss.differentiate_ = torch.compile(differentiate_at_once_, fullgraph=True)
    if config.float8:
        use_float8(model, device, "tensorwise" if config.float8 is True else config.float8)


def is_compiled(config: ParallelConfig, device: torch.device) -> bool:
    """Whether blocks and loss are compiled. If `parallel.compile` is null, a GPU on which nothing can be compiled trains without;
    on a CPU null is decided before, by choices.decide. Raises ConfigError when it is true where nothing can be compiled."""
    on_gpu = device.type == "cuda"
    compiled = config.is_compiled(on_gpu)
    if not compiled or (missing := missing_for_compile(on_gpu)) is None:
        return compiled
    if config.compile:
        raise ConfigError("parallel.compile", f"needs {missing}, which is not found; install it, or set false")
    return False


def missing_for_compile(on_gpu: bool = True) -> str | None:
    """What torch.compile lacks on this machine to build kernels for a GPU or for the CPU; None if nothing. Triton builds its
    launcher in C, and the kernels for a CPU are in C++."""
    if on_gpu and importlib.util.find_spec("triton") is None:
        return "Triton"
    if on_gpu and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang or $CC)"
    if not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:  # where Inductor looks for one
        return "a C++ compiler (g++ or $CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h (the package python3-dev)"
    return None


def choose_cpu_kernels(config: TrainConfig, recorded: CpuKernels | None = None) -> CpuKernels:
    """The value of parallel.cpu_kernels for a CPU that can build them, where the configuration has null: `recorded`, that of the
    checkpoint that is resumed, else "loss" where torch's attention is faster on this machine, else true."""
    if recorded is not None:
        return recorded
    from olmo_train.parallel.cpu_kernels import torch_is_faster

    shape = measured_attention(config)
    return "loss" if shape is not None and torch_is_faster(shape) else True


def measured_attention(config: TrainConfig) -> AttentionShape | None:
    """What is measured to choose the attention of a run on this machine's CPU; None where nothing is.

    Not where the same command must always compute the same bits, as a second measurement could end differently, and not where a
    call takes about a millisecond.
    """
    from olmo_train.parallel.cpu_kernels import LANES, MEASURED_FLOPS, AttentionShape

    model = config.model
    group, threads = model.n_heads // model.kv_heads, torch.get_num_threads()
    shape = AttentionShape(config.parallel.precision, model.head_size, group, model.seq_len, config.data.document_mask, threads)
    is_small = config.micro_batch_size * model.kv_heads * shape.flops < MEASURED_FLOPS
    return None if is_small or config.determinism != "none" or model.head_size % LANES else shape.fitted()


def describe_attention(config: TrainConfig) -> str:
    """How attention is computed on this machine's CPU and how that was chosen, for a reader. Raises ConfigError."""
    from olmo_train.parallel.cpu_kernels import BF16_PRODUCTS, LANES, attention_seconds, library

    asked, device = config.parallel.cpu_kernels, torch.device("cpu")
    if not has_cpu_kernels(asked, device) or asked == "loss" or config.model.head_size % LANES:
        return "torch's kernel"
    products = BF16_PRODUCTS[library().bf16_products() if config.parallel.precision == "bf16" else 0]
    ours = f"C++ kernel with products in {products}"
    shape = measured_attention(config) if asked is None else None
    seconds = attention_seconds(shape) if shape else None
    if seconds is None:
        return f"{ours}, not compared with torch's"
    own, torchs = (f"{1000 * each:.1f} ms" for each in seconds)
    if choose_cpu_kernels(config) == "loss":
        return f"torch's kernel: {torchs} where the {ours} takes {own}"
    return f"{ours}: {own} where torch's takes {torchs}"


def has_cpu_kernels(asked: CpuKernels | None, device: torch.device) -> bool:
    """Whether to use cpu_kernels.py for attention and loss. `asked`: parallel.cpu_kernels, with None: if they can be built."""
    if asked and device.type != "cpu":
        raise ConfigError("parallel.cpu_kernels", f"is for CPUs, and the device is {device.type}; leave it out")
    if asked is False or device.type != "cpu":
        return False
    from olmo_train.parallel import cpu_kernels

    try:
        cpu_kernels.library()
    except ConfigError:
        if asked:
            raise
        return False
    return True


def uses_cpu_kernels(model: Transformer) -> bool:
    """Whether `select_kernels` chose cpu_kernels.py for the attention of this model."""
    return model.blocks[0].attn.attend is not Attention.attend


def use_float8(model: Transformer, device: torch.device, scaling: str) -> None:
    """Compute the matrix products of the blocks in float8 with torchao; `scaling` is its recipe. A CPU emulates it. Raises
    ConfigError if torchao is missing, the GPU has no float8, or a size is not a multiple of 16."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ConfigError("parallel.float8", "needs torchao: pip install 'olmo-train[float8]'") from None
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError("parallel.float8", f"{torch.cuda.get_device_name()} has no float8; set it to false")
    for name, weight in model.blocks.named_parameters():
        if weight.ndim == 2 and any(size % FLOAT8_MULTIPLE for size in weight.shape):
            what = f"sizes must be multiples of {FLOAT8_MULTIPLE}, but {name} is {tuple(weight.shape)}; set it to false"
            raise ConfigError("parallel.float8", what)
    recipe = Float8LinearConfig.from_recipe_name(scaling)
    convert_to_float8_training(model.blocks, config=replace(recipe, emulate=device.type == "cpu"))

"""Select the implementations of attention, loss and matrix products by device, once, from outside the model.

On a CPU, attention and loss are our C++ kernels if they can be built. On a GPU, attention is torch's, or FlashAttention 3 if it
is installed, and the loss is compiled with the blocks.
"""

from __future__ import annotations

import importlib.util

import torch

from olmo_train.errors import ConfigError
from olmo_train.model.loss import differentiate_at_once_
from olmo_train.model.transformer import Attention, Transformer

FLOAT8_MULTIPLE = 16  # sizes of a float8 matrix product must be multiples (cuBLAS)


def select_kernels(model: Transformer, device: torch.device, cpu_kernels: bool | None, compiled: bool, float8: bool) -> None:
    """Set the implementations that the keys of `parallel` select, in place. Raises ConfigError if one is not available here."""
    if has_cpu_kernels(cpu_kernels, device):
        from olmo_train.parallel.cpu_kernels import attend, differentiate_

        model.loss.differentiate_ = differentiate_
        for block in model.blocks:
            block.attn.attend = attend
    if device.type == "cuda":
        # FlashAttention 3, if it is installed, but not in deterministic runs: its backward adds in no fixed order.
        has_flash = torch.cuda.get_device_capability()[0] == 9 and importlib.util.find_spec("flash_attn_interface")
        if has_flash and not torch.are_deterministic_algorithms_enabled():
            torch.nn.attention.activate_flash_attention_impl("FA3")
        if compiled:
            model.loss.differentiate_ = torch.compile(differentiate_at_once_)
    if float8:
        use_float8(model, device)


def has_cpu_kernels(asked: bool | None, device: torch.device) -> bool:
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
    """Whether `select_kernels` chose cpu_kernels.py for this model."""
    return model.blocks[0].attn.attend is not Attention.attend


def use_float8(model: Transformer, device: torch.device) -> None:
    """Compute the matrix products of the blocks in float8 with torchao, tensorwise scaled; a CPU emulates it. Raises ConfigError
    if torchao is missing, the GPU has no float8, or a size is not a multiple of 16."""
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
    convert_to_float8_training(model.blocks, config=Float8LinearConfig(emulate=device.type == "cpu"))

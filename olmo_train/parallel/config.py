"""The `parallel` section: sharding, precision, activation checkpointing and compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from olmo_train.config import Count

Precision = Literal["bf16", "fp32"]
Checkpointing = Literal["none", "selective", "full"]
CpuKernels = bool | Literal["loss"]


@dataclass(frozen=True)
class ParallelConfig:
    # full: ZeRO-3, gathers weights block by block; grad_op: ZeRO-2, keeps them gathered until the step ends
    shard: Literal["full", "grad_op"] = "full"
    replicas: Count = 1  # full copies of the sharded state (HSDP)
    # of compute; weights and optimizer state are always fp32. auto: bf16 where this device multiplies matrices faster in it than
    # in fp32, which a CPU measures when the run starts; config.yaml records which, and a resumed run keeps it
    precision: Literal["bf16", "fp32", "auto"] = "bf16"
    reduce_dtype: Precision = "fp32"  # type in which gradients are summed over ranks
    # selective: store the results of matrix products and attention, recompute norms, RoPE and activation; full: recompute all, a
    # third more compute for far less memory
    activation_checkpointing: Checkpointing = "none"
    # torch.compile blocks and loss. null: on a GPU where kernels can be built (Triton, a C compiler), and on a CPU with a C++
    # compiler if the run is long enough to pay for it, by an estimate that is printed; never if `determinism` asks for the same
    # bits. It takes half a minute the first time, a few seconds from the cache (TORCHINDUCTOR_CACHE_DIR). On a CPU config.yaml
    # records the decision, and a resumed run keeps it
    compile: bool | None = None
    # matrix products of the blocks in float8 by torchao (pip install 'olmo-train[float8]'), on GPUs that support it; a CPU
    # emulates it slowly. true: one scale for a matrix, 1.28 times the speed of bf16 for OLMo-7B's layers on an H100; rowwise: one
    # for each row, less rounding where few values are large, 1.07 times
    float8: bool | Literal["rowwise"] = False
    # C++ kernels for attention and loss on a CPU. null: where a compiler (c++ or CXX) is found, but torch's attention where it
    # is measured to be faster on this machine; true: fail if they cannot be built; loss: for the loss, attention by torch;
    # false: use torch. What null chose is kept in checkpoints and on resume; with `determinism` nothing is measured. They take
    # seconds to build and are cached. Head sizes that are not multiples of 16 use torch
    cpu_kernels: CpuKernels | None = None

    def is_compiled(self, on_gpu: bool) -> bool:
        """Whether blocks and loss are compiled on this kind of device."""
        return on_gpu if self.compile is None else self.compile

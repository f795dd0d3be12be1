"""The `parallel` section: sharding, precision, recomputation and compilation."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_train.errors import ConfigError, check_choice

# Implemented in shard.py and recompute.py; a test holds both sides equal.
PRECISION_NAMES = ("bf16", "fp32")
CHECKPOINTING_NAMES = ("none", "selective", "full")


@dataclass(frozen=True)
class ParallelConfig:
    shard: str = "full"  # full: ZeRO-3, gathers weights block by block; grad_op: ZeRO-2, keeps them gathered until the step ends
    replicas: int = 1  # full copies of the sharded state (HSDP)
    precision: str = "bf16"  # of the computation: bf16 or fp32; weights and optimizer state are always fp32
    reduce_dtype: str = "fp32"  # type in which gradients are summed over ranks
    activation_checkpointing: str = "none"  # selective: recompute all but matrix products and attention; full: recompute all
    compile: bool = False  # torch.compile each block
    float8: bool = False  # matrix products of the blocks in float8, tensorwise scaled (torchao); a CPU only emulates it
    cpu_kernels: bool | None = None  # C++ kernels for attention and loss on a CPU; null: if a C++ compiler is found

    def __post_init__(self) -> None:
        check_choice("parallel.shard", self.shard, ("full", "grad_op"))
        check_choice("parallel.precision", self.precision, PRECISION_NAMES)
        check_choice("parallel.reduce_dtype", self.reduce_dtype, PRECISION_NAMES)
        check_choice("parallel.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING_NAMES)
        if self.replicas < 1:
            raise ConfigError("parallel.replicas", f"must be at least 1, got {self.replicas}")

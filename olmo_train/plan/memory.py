"""The memory of a GPU by part, before launch.

Memory can peak at three moments of a step; at each, the bytes of every part are a closed formula. The formulas follow what
autograd and FSDP2 keep for the model of transformer.py without torch.compile; tests compare them with the live tensors of a
real step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from olmo_train.errors import ConfigError
from olmo_train.formats import counted
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import (
    FULL,
    LOSS_PART_BYTES,
    adapted_shapes,
    adapter_parameters,
    attention_parameters,
    block_matrices,
    block_parameters,
    count_parameters,
    end_parameters,
    mlp_parameters,
    trained_parameters,
)
from olmo_train.optim.config import ROUND_ELEMENTS

BYTES = {"bf16": 2, "fp32": 4}
RUNTIME_BYTES = 1_500_000_000  # assumed: CUDA context, NCCL buffers, cuBLAS workspaces, fragments between tensors


@dataclass(frozen=True)
class Layout:
    """How a step is distributed over the GPUs, and what it trains. Names are those of the configuration's `parallel` section,
    `optim.name` and `adapter`."""

    gpus: int = 1
    replicas: int = 1
    shard: str = "full"
    precision: str = "bf16"
    reduce_dtype: str = "fp32"
    activation_checkpointing: str = "none"
    micro_batch_size: int = 1  # sequences of one forward on one GPU
    micro_batches: int = 1  # of one GPU in one step
    optimizer: str = "adamw"
    adapter: AdapterConfig = FULL

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus % self.replicas:
            raise ConfigError("parallel.replicas", f"{self.replicas} does not divide the {counted(self.gpus, 'GPU')} of the plan")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU: {moment: {part: bytes}}."""

    moments: dict[str, dict[str, int]]

    @property
    def moment(self) -> str:
        """The moment at which memory is highest."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        """Bytes of live tensors at the highest moment, without RUNTIME_BYTES."""
        return sum(self.moments[self.moment].values())

    def fits(self, memory_bytes: float) -> bool:
        return self.peak + RUNTIME_BYTES <= memory_bytes


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered at once."""

    gathered: int  # bytes, all of them on one GPU
    trained: int  # parameters, which have gradients


def units(model: ModelConfig, layout: Layout) -> tuple[Unit, Unit, Unit]:
    """What is gathered before the blocks, for a block, and after them. A block is gathered with its adapters, which are fp32."""
    width, block, (first, last) = BYTES[layout.precision], block_parameters(model), end_parameters(model)
    if layout.adapter.is_on:
        adapters = adapter_parameters(model, layout.adapter) // model.n_layers
        return Unit(width * first, 0), Unit(width * block + 4 * adapters, adapters), Unit(width * last, 0)
    return Unit(width * first, first), Unit(width * block, block), Unit(width * last, last)


def memory_estimate(model: ModelConfig, layout: Layout) -> MemoryEstimate:
    """Bytes of one GPU by part at the three moments of a step that can be the highest.

    loss: the loss is differentiated, and every block's activations are kept.
    backward: a block is differentiated; with activation checkpointing, after it was recomputed.
    update: all gradients exist, those of the embedding and the head are reduced, and the optimizer steps.
    """
    first, block, last = units(model, layout)
    trained = trained_parameters(model, layout.adapter)
    whole = first.gathered + model.n_layers * block.gathered + last.gathered  # bytes of all gathered weights
    width, reduced, shards = BYTES[layout.precision], BYTES[layout.reduce_dtype], layout.gpus // layout.replicas
    state = stored_bytes(model, layout)

    def parts(gradients: int, activations: int, logits: int, buffers: int) -> dict[str, int]:
        return state | {
            "gradients": gradients,
            "activations": activations,
            "logits and loss": logits,
            "gathered weights, buffers": buffers,
        }

    # Micro-batches before the last add up whole gradients on each rank; sharded ones appear with the last.
    accumulates = layout.micro_batches > 1
    whole_gradients = reduced * trained if accumulates else 0
    tokens = layout.micro_batch_size * model.seq_len
    kept, final = tokens * kept_activation_bytes(model, layout), tokens * final_activation_bytes(model, layout)
    reshards = layout.shard == "full" and shards > 1  # one rank keeps its weights whole, see parallel.shard
    # While the loss is computed, the buffer of the last gather is there too: that of the head, or of the last block.
    gathered = whole if not reshards else 2 * last.gathered or first.gathered + block.gathered
    loss = parts(whole_gradients, model.n_layers * kept + final, loss_bytes(model, layout, tokens), gathered)

    def after_backward(unit: Unit) -> int:
        """Bytes that a unit's gradients add once they are sharded."""
        return math.ceil(4 * unit.trained / shards) - (reduced * unit.trained if accumulates else 0)

    # From block to block the backward adds sharded gradients and frees activations, so the highest block is its first or its
    # last. Either meets the buffer from which the gradients of the unit before are being reduced.
    freed, gradients, reducing = 0, after_backward(last), reduced * last.trained
    later = (model.n_layers - 1) * after_backward(block)
    if model.n_layers > 1 and later - (model.n_layers - 1) * kept + reduced * block.trained > reducing:
        freed, gradients, reducing = (model.n_layers - 1) * kept, gradients + later, reduced * block.trained
    working = tokens * block_working_bytes(model, layout)
    # The block at work, and the next one, gathered at the same time.
    gathered = (0 if last.gathered else first.gathered) + 2 * block.gathered if reshards else whole
    largest = model.d_model * model.mlp_hidden  # the gradient of a matrix; for DoRA's norms a matrix and its squares in fp32
    of_matrix = {"none": width * largest, "lora": 0, "dora": 8 * largest}[layout.adapter.kind]
    backward = parts(whole_gradients + gradients, model.n_layers * kept - freed + working, 0, gathered + of_matrix + reducing)

    # Muon's copies come when the buffers from which the last gradients are reduced are gone.
    buffers = max((width + reduced) * first.trained, matrix_working_bytes(model, layout))
    gathered = first.gathered if model.tie_embeddings or not reshards else 0
    update = parts(math.ceil(4 * trained / shards), 0, 0, gathered + buffers)
    return MemoryEstimate({"loss": loss, "backward": backward, "update": update})


def stored_bytes(model: ModelConfig, layout: Layout) -> dict[str, int]:
    """Bytes of weights and moments that rank 0 stores. It has a row more of embedding and head than some others if their rows do
    not divide evenly."""
    adapter, shards = layout.adapter, layout.gpus // layout.replicas
    of_weight, of_moments = (BYTES[layout.precision], 0) if adapter.is_on else (4, 8)  # bytes of a parameter of the model
    uneven = -model.vocab_rows % shards * model.d_model * (1 if model.tie_embeddings else 2)
    weights = of_weight * (count_parameters(model).total + uneven) + 4 * adapter_parameters(model, adapter)
    moments = checkpoint_bytes(model, layout.optimizer, adapter) - 4 * trained_parameters(model, adapter) + of_moments * uneven
    return {"weights": math.ceil(weights / shards), "optimizer": math.ceil(moments / shards)}


def loss_bytes(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """Bytes of the logits, which become their own gradients (model/loss.py), and of the larger of two further buffers: the fp32
    probabilities of the part in progress, with that part itself in fp32, or the gradients of the head's weight, unless it is
    frozen, and of its input."""
    width, logits = BYTES[layout.precision], tokens * model.vocab_rows
    part = min(4 * logits, LOSS_PART_BYTES) * (1 if width == 4 else 2)
    return width * logits + max(part, width * model.d_model * ((0 if layout.adapter.is_on else model.vocab_rows) + tokens))


def checkpoint_bytes(model: ModelConfig, optimizer: str, adapter: AdapterConfig = FULL) -> int:
    """Bytes of trained weights and optimizer state, all in fp32: what a checkpoint holds. AdamW keeps two moments of a parameter,
    Muon, which trains no adapters, one of each matrix of the blocks and AdamW's two of the rest."""
    matrices = model.n_layers * (attention_parameters(model) + mlp_parameters(model)) if optimizer == "muon" else 0
    return 12 * trained_parameters(model, adapter) - 4 * matrices


def state_bytes(model: ModelConfig, optimizer: str, adapter: AdapterConfig = FULL, precision: str = "bf16") -> int:
    """Bytes of weights, gradients and optimizer state in training, over all GPUs of a replica. Weights that are frozen under
    adapters are in `precision`, and have neither gradients nor optimizer state."""
    frozen = BYTES[precision] * count_parameters(model).total if adapter.is_on else 0
    return checkpoint_bytes(model, optimizer, adapter) + 4 * trained_parameters(model, adapter) + frozen


def matrix_working_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes of full matrices and their copies in one round of Muon's update, in fp32; 0 with AdamW. A GPU, which orthogonalizes
    in bf16, needs less."""
    if layout.optimizer != "muon":
        return 0
    shapes = block_matrices(model).values()
    sizes = [rows * columns for rows, columns in shapes]
    largest, square = max(sizes), max(min(shape) ** 2 for shape in shapes)
    own = max(largest, min(math.ceil(model.n_layers * sum(sizes) / layout.gpus), ROUND_ELEMENTS))  # of this rank in a round
    updates = layout.replicas * own  # this rank's shards of the matrices of all ranks
    orthogonalizing = updates + own + (own if layout.gpus > 1 else 0) + 4 * largest + 3 * square
    sending = 3 * updates + own if layout.gpus > 1 else 0
    return 4 * max(orthogonalizing, sending)


def kept_activation_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes per token that one block keeps from its forward until its backward."""
    width = BYTES[layout.precision]
    if layout.activation_checkpointing == "none":
        return block_activation_bytes(model, layout) + adapter_activation_bytes(model, layout)
    kept = width * model.d_model  # its input
    if layout.activation_checkpointing == "selective":  # and the results of attention, the two output matrices and adapters
        kept += product_bytes(model, layout.precision) + 2 * width * model.d_model
        kept += sum(width * (layout.adapter.rank + rows) for rows, _ in adapted_shapes(model, layout.adapter))
    return kept


def adapter_activation_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes per token that the adapters of one block keep: A x, and with DoRA the output that is scaled by its factors."""
    scaled = layout.adapter.kind == "dora"
    kept = sum(layout.adapter.rank + scaled * rows for rows, _ in adapted_shapes(model, layout.adapter))
    return BYTES[layout.precision] * kept


def product_bytes(model: ModelConfig, precision: str) -> int:
    """Bytes per token of the results of one block's input matrices and attention, which are kept with and without selective
    activation checkpointing."""
    width = BYTES[precision]
    queries, keys = model.n_heads * model.head_size, model.kv_heads * model.head_size
    attention = width * queries + 4 * model.n_heads  # with its log-sum-exp in fp32
    return width * (queries + 2 * keys) + attention + width * model.mlp_hidden * (2 if model.gated else 1)


def final_activation_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes per token kept outside the blocks, without the logits: the final norm, the head's input, the ids."""
    return norm_activation_bytes(model, model.d_model, layout) + BYTES[layout.precision] * model.d_model + 16


def block_activation_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes per token that one block keeps: what each operation of Attention, MLP and the norms saves for its backward."""
    width = BYTES[layout.precision]
    queries, keys = model.n_heads * model.head_size, model.kv_heads * model.head_size
    norms = 1 if model.block == "parallel" else 2
    kept = norms * (norm_activation_bytes(model, model.d_model, layout) + width * model.d_model)  # and matrix inputs
    kept += width * (queries + 2 * keys)  # v, and q and k after their rotation
    if model.clip_qkv is not None:
        kept += width * (queries + 2 * keys)  # what is clamped
    kept += width * queries + 4 * model.n_heads  # the output of attention, and its log-sum-exp in fp32
    if model.qk_norm:
        kept += sum(norm_activation_bytes(model, size, layout) for size in (queries, keys))
    kept += width * model.mlp_hidden * (4 if model.gated else 2)  # up and gate, act(gate), the product; or in and out
    return kept


def norm_activation_bytes(model: ModelConfig, size: int, layout: Layout) -> int:
    """Bytes per token that one norm of `size` features keeps: LayerNorm its input, mean and deviation; RMSNorm, which is
    written out in fp32, its input in fp32 and the root, and for the gradient of its weight also its quotient in fp32."""
    width = BYTES[layout.precision]
    if model.norm.startswith("layer_norm"):
        return width * size + 2 * width
    return (4 if layout.adapter.is_on else 8) * size + 4


def block_working_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes per token at the peak of a block's backward, in addition to what all blocks keep: the gradients of the residual
    stream and of the MLP's two factors (or of its one hidden vector), and the recomputed activations."""
    width = BYTES[layout.precision]
    gradients = width * (model.d_model + (2 if model.gated else 1) * model.mlp_hidden)
    if layout.activation_checkpointing == "none":
        return gradients
    again = block_activation_bytes(model, layout) - width * model.d_model  # its input is kept already
    if layout.activation_checkpointing == "selective":
        again -= product_bytes(model, layout.precision)
    return gradients + again + adapter_activation_bytes(model, layout)


def largest_micro_batch(model: ModelConfig, layout: Layout, memory_bytes: float) -> int | None:
    """The largest micro-batch, in sequences, that divides one GPU's share of the batch and fits; None when none does."""
    share = layout.micro_batch_size * layout.micro_batches
    for size in range(share, 0, -1):
        if share % size == 0:
            trial = replace(layout, micro_batch_size=size, micro_batches=share // size)
            if memory_estimate(model, trial).fits(memory_bytes):
                return size
    return None

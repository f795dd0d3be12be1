"""What a model costs, from its configuration alone: parameters by part, matrix parameters, FLOPs per token.

Everything is a closed formula of ModelConfig, so the figures are the same for any number of processes, before the model is
built and after it is sharded. Nothing here counts the tensors of a live model.
"""

from __future__ import annotations

from dataclasses import dataclass

from olmo_train.model.config import AdapterConfig, ModelConfig

FULL = AdapterConfig()  # full training, without adapters
LOSS_PART_BYTES = 2**28  # bytes of fp32 logits that the loss processes at a time, on a GPU


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part of the model; `head` is 0 when it is tied to the embedding. Padding rows count: they exist."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.mlp + self.norms + self.head


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters by part: OLMo-1B 1,176,764,416 and OLMo-7B 6,888,095,744 in all."""
    table = config.vocab_rows * config.d_model
    return ParameterCount(
        embedding=table,
        attention=config.n_layers * attention_parameters(config),
        mlp=config.n_layers * mlp_parameters(config),
        norms=config.n_layers * block_norm_parameters(config) + norm_parameters(config, config.d_model),
        head=0 if config.tie_embeddings else table,
    )


def attention_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{name: shape} of one block's matrices in attention: the q, k, v and output projections."""
    queries, keys, d_model = config.n_heads * config.head_size, config.kv_heads * config.head_size, config.d_model
    return {"wq": (queries, d_model), "wk": (keys, d_model), "wv": (keys, d_model), "wo": (d_model, queries)}


def mlp_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{name: shape} of one block's matrices in the MLP: a gated one has two input matrices."""
    inputs = ["w_gate", "w_up"] if config.gated else ["w_up"]
    return dict.fromkeys(inputs, (config.mlp_hidden, config.d_model)) | {"w_down": (config.d_model, config.mlp_hidden)}


def block_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{name: shape} of one block's matrices, which are what an adapter can have as targets."""
    return attention_matrices(config) | mlp_matrices(config)


def adapted_shapes(config: ModelConfig, adapter: AdapterConfig) -> list[tuple[int, int]]:
    """Shapes of one block's matrices that have an adapter."""
    return [shape for name, shape in block_matrices(config).items() if adapter.is_on and name in adapter.targets]


def adapter_parameters(config: ModelConfig, adapter: AdapterConfig) -> int:
    """Parameters of all adapters: SmolLM2-135M has 2,442,240 with LoRA of rank 8."""
    adapted = adapted_shapes(config, adapter)
    magnitudes = sum(rows for rows, _ in adapted) if adapter.kind == "dora" else 0
    return config.n_layers * (magnitudes + adapter.rank * sum(rows + columns for rows, columns in adapted))


def trained_parameters(config: ModelConfig, adapter: AdapterConfig) -> int:
    """Parameters that have gradients: the adapters, or without them all."""
    return adapter_parameters(config, adapter) if adapter.is_on else count_parameters(config).total


def attention_parameters(config: ModelConfig) -> int:
    """Matrix parameters of one block's attention."""
    return sum(rows * columns for rows, columns in attention_matrices(config).values())


def mlp_parameters(config: ModelConfig) -> int:
    """Matrix parameters of one block's MLP."""
    return sum(rows * columns for rows, columns in mlp_matrices(config).values())


def norm_parameters(config: ModelConfig, width: int) -> int:
    """Parameters of one norm over `width` features: none, a weight, or a weight and a bias."""
    if config.norm == "layer_norm_nonparametric":
        return 0
    return width * (2 if config.bias == "norm" else 1)


def block_norm_parameters(config: ModelConfig) -> int:
    """Parameters of one block's norms, with those of q and k when they are normalized."""
    norms = norm_parameters(config, config.d_model) * (1 if config.block == "parallel" else 2)
    if config.qk_norm:
        norms += norm_parameters(config, config.n_heads * config.head_size)
        norms += norm_parameters(config, config.kv_heads * config.head_size)
    return norms


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block, norms included: what FSDP gathers and frees as one unit."""
    return attention_parameters(config) + mlp_parameters(config) + block_norm_parameters(config)


def end_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters outside the blocks, as FSDP gathers them: the embedding before the blocks, then final norm and head after them.
    If embedding and head are tied, all are one unit, which is there from the beginning to the end of the backward."""
    ends = count_parameters(config).total - config.n_layers * block_parameters(config)
    first = ends if config.tie_embeddings else count_parameters(config).embedding
    return first, ends - first


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with: all projections and the head (also a tied one).

    The input embedding is a look-up and a norm's weight is no matrix, so neither is counted.
    """
    blocks = config.n_layers * (attention_parameters(config) + mlp_parameters(config))
    return blocks + config.vocab_rows * config.d_model


def flops_convention(adapter: AdapterConfig = FULL) -> str:
    """What flops_per_token counts, in words."""
    matrices = "4 x frozen and 6 x trained matrix parameters" if adapter.is_on else "6 x matrix parameters"
    return f"{matrices} + 12 x layers x heads x head_dim x seq_len, causal attention not discounted"


def flops_per_token(config: ModelConfig, seq_len: int | None = None, adapter: AdapterConfig = FULL) -> int:
    """Training FLOPs of one token, forward and backward, in an instance of `seq_len` tokens (the model's by default).

    The convention of OLMo-core and torchtitan, see flops_convention: 2 FLOPs a matrix parameter forward and 4 backward;
    attention's two products cost 4 x width x seq_len forward and twice that backward, as if no position were masked.
    Recomputation by activation checkpointing is not counted. OLMo-1B at 2048 tokens: 7.866 GFLOPs.

    A frozen matrix has 4 FLOPs a parameter, as it has no gradient of its weights, and the matrices of adapters have 6.
    """
    seq_len = config.seq_len if seq_len is None else seq_len
    attention_width = config.n_heads * config.head_size
    matrices = (4 if adapter.is_on else 6) * matrix_parameters(config) + 6 * adapter_parameters(config, adapter)
    return matrices + 12 * config.n_layers * attention_width * seq_len

"""The `model` section: the shape of a transformer. All other figures of a model follow from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass

from olmo_train.errors import ConfigError, check_choice

# Implemented in transformer.py, norms.py and init.py. The names are listed here so that a configuration is checked without
# importing torch; a test compares both sides.
NORM_NAMES = ("layer_norm_nonparametric", "layer_norm", "rms_norm", "rms_norm_offset")
ACTIVATION_NAMES = ("swiglu", "geglu", "gelu")
BLOCK_NAMES = ("sequential", "parallel", "reordered_norm")
INIT_NAMES = ("mitchell", "normal")


@dataclass(frozen=True)
class ModelConfig:
    """Defaults are OLMo-7B (Groeneveld et al. 2024, table 1 and configs/official/OLMo-7B.yaml)."""

    d_model: int = 4096  # width of the residual stream
    n_layers: int = 32
    n_heads: int = 32  # query heads
    n_kv_heads: int | None = None  # key and value heads; null: as many as n_heads, 1: multi-query attention
    head_dim: int | None = None  # null: d_model / n_heads (Gemma-7B has 256 with d_model 3072)
    mlp_hidden: int = 11008  # width of the MLP: rows of w_up, and of w_gate
    vocab_size: int = 50280  # number of token ids of the tokenizer
    padded_vocab_size: int | None = 50304  # rows of the embedding; null: vocab_size rounded up to a multiple of 128
    seq_len: int = 2048  # tokens of one training instance
    norm: str = "layer_norm_nonparametric"
    norm_eps: float = 1e-5  # added to the variance
    qk_norm: bool = False  # normalize the whole q and k vectors before they are split into heads, as OLMo2
    activation: str = "swiglu"
    block: str = "sequential"  # parallel: attention and MLP read one norm, as PaLM; reordered_norm: norms on outputs, as OLMo2
    bias: str = "none"  # none: no Linear and no norm has a bias; norm: the norms with weights have one
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False  # the head is the embedding
    embedding_scale: bool = False  # multiply embeddings by sqrt(d_model), as Gemma
    clip_qkv: float | None = None  # clamp q, k and v to [-clip, clip] before the rotation
    z_loss: float = 0.0  # weight of log(sum(exp(logits)))^2, added to the training loss but not to the logged loss
    init: str = "mitchell"
    init_std: float = 0.02  # read by init: normal

    def __post_init__(self) -> None:
        for key, known in (("norm", NORM_NAMES), ("activation", ACTIVATION_NAMES), ("block", BLOCK_NAMES), ("init", INIT_NAMES),
                           ("bias", ("none", "norm"))):  # fmt: skip
            check_choice(f"model.{key}", getattr(self, key), known)
        for key in ("d_model", "n_layers", "n_heads", "mlp_hidden", "vocab_size", "seq_len"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key}", f"must be at least 1, got {getattr(self, key)}")
        for key in ("head_dim", "norm_eps", "rope_theta", "clip_qkv", "init_std"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"model.{key}", f"must be a finite number above 0, got {value}")
        if not 0 <= self.z_loss < 1:
            raise ConfigError("model.z_loss", f"must be at least 0 and below 1, got {self.z_loss}; PaLM has 1e-4, OLMo2 1e-5")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ConfigError(
                "model.n_heads",
                f"{self.n_heads} does not divide d_model {self.d_model}; choose a divisor or set model.head_dim",
            )
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ConfigError("model.n_kv_heads", f"{self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_size % 2:
            raise ConfigError("model.head_dim", f"{self.head_size} is odd, but RoPE rotates pairs; use an even size")
        if self.vocab_rows < self.vocab_size:
            raise ConfigError("model.padded_vocab_size", f"{self.padded_vocab_size} is below vocab_size {self.vocab_size}")
        if self.bias == "norm" and self.norm != "layer_norm":
            raise ConfigError("model.bias", f"'norm' needs norm: layer_norm, got {self.norm}, which has no bias")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def vocab_rows(self) -> int:
        return -(-self.vocab_size // 128) * 128 if self.padded_vocab_size is None else self.padded_vocab_size

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

"""The `model` section, the shape of a transformer, from which all its other figures follow, and the `adapter` section."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, get_args

from olmo_train.config import Count, Fraction, Positive, Rule, names_in
from olmo_train.errors import ConfigError

FOLDER = Path(__file__).parent
if TYPE_CHECKING:
    Norm: TypeAlias = str
    Activation: TypeAlias = str
    Block: TypeAlias = str
    Init: TypeAlias = str
else:  # the names of the rows, read without importing torch
    Norm = Literal[names_in("NORMS", FOLDER / "norms.py")]
    Activation = Literal[names_in("ACTIVATIONS", FOLDER / "transformer.py")]
    Block = Literal[names_in("BLOCKS", FOLDER / "transformer.py")]
    Init = Literal[names_in("INITS", FOLDER / "init.py")]
Target = Literal["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"]
Ratio = Annotated[float, Rule("finite and at least 1", lambda x: 1 <= x < math.inf)]


@dataclass(frozen=True)
class ModelConfig:
    """Defaults are OLMo-7B (Groeneveld et al. 2024, table 1 and configs/official/OLMo-7B.yaml)."""

    d_model: Count = 4096  # width of the residual stream
    n_layers: Count = 32  # number of blocks
    n_heads: Count = 32  # query heads
    n_kv_heads: Count | None = None  # key and value heads; null: as many as n_heads, 1: multi-query attention
    head_dim: Count | None = None  # width of a head; null: d_model / n_heads (Gemma-7B has 256 with d_model 3072)
    mlp_hidden: Count = 11008  # width of the MLP: rows of w_up, and of w_gate
    vocab_size: Count = 50280  # number of token ids of the tokenizer
    padded_vocab_size: int | None = 50304  # rows of the embedding; null: vocab_size rounded up to a multiple of 128
    seq_len: Count = 2048  # tokens of one training instance
    norm: Norm = "layer_norm_nonparametric"  # nonparametric: no weights; offset: multiplies by 1 + weight, as Gemma
    norm_eps: Positive = 1e-5  # added to the variance by norms
    qk_norm: bool = False  # normalize the whole q and k vectors before they are split into heads, as OLMo2
    activation: Activation = "swiglu"  # activation of the MLP; those ending in glu are gated
    block: Block = "sequential"  # parallel: attention and MLP read one norm, as PaLM; reordered_norm: norms on outputs, as OLMo2
    bias: Literal["none", "norm"] = "none"  # none: no Linear and no norm has a bias; norm: the norms with weights have one
    rope_theta: Positive = 10_000.0  # base of the wavelengths of the rotary position embedding
    tie_embeddings: bool = False  # the head is the embedding
    embedding_scale: bool = False  # multiply embeddings by sqrt(d_model), as Gemma
    clip_qkv: Positive | None = None  # clamp q, k and v to [-clip, clip] before the rotation
    z_loss: Fraction = 0.0  # weight of log(sum(exp(logits)))^2 in the training loss, not in the logged one; PaLM 1e-4, OLMo2 1e-5
    init: Init = "mitchell"  # initial weights; mitchell: by fan-in and depth, as OLMo; normal: init_std for all matrices
    init_std: Positive = 0.02  # standard deviation of init: normal
    # mup: learning rate, weight decay and initial weights hold for every width (Yang et al. 2022); completep: and for every depth
    # (Dey et al. 2025); docs/mup.md has the rules
    parametrization: Literal["standard", "mup", "completep"] = "standard"
    base_width: Count | None = None  # d_model of the model for which the learning rate was chosen, with mup and completep
    base_depth: Count | None = None  # its n_layers, with completep
    base_head_dim: Count | None = None  # its head_dim, where that differs, with mup and completep; null: the same

    def __post_init__(self) -> None:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ConfigError(
                "model.n_heads",
                f"{self.n_heads} does not divide d_model {self.d_model}; choose a divisor or set model.head_dim",
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError("model.n_kv_heads", f"{self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_size % 2:
            raise ConfigError("model.head_dim", f"{self.head_size} is odd, but RoPE rotates pairs; use an even size")
        if self.vocab_rows < self.vocab_size:
            raise ConfigError("model.padded_vocab_size", f"{self.padded_vocab_size} is below vocab_size {self.vocab_size}")
        if self.bias == "norm" and self.norm != "layer_norm":
            raise ConfigError("model.bias", f"'norm' needs norm: layer_norm, got {self.norm}, which has no bias")
        self._check_parametrization()

    def _check_parametrization(self) -> None:
        needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_depth")}[self.parametrization]
        for key in ("base_width", "base_depth", "base_head_dim"):
            value = getattr(self, key)
            if key in needed and value is None:
                what = f"is not set; {self.parametrization} needs the {'d_model' if key == 'base_width' else 'n_layers'}"
                raise ConfigError(f"model.{key}", f"{what} of the model for which the learning rate was chosen")
            if value is not None and key not in (*needed, *(["base_head_dim"] if needed else [])):
                kinds = "completep" if key == "base_depth" else "mup or completep"
                what = f"is read with parametrization: {kinds} only, not {self.parametrization}; leave it out"
                raise ConfigError(f"model.{key}", what)

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        """The width of one head, D in the shapes of transformer.py."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def width_ratio(self) -> float:
        """The width over that of the base: m_N of Dey et al. 2025; 1 under the standard parametrization."""
        return self.d_model / (self.base_width or self.d_model)

    @property
    def depth_ratio(self) -> float:
        """The depth over that of the base: m_L of Dey et al. 2025; 1 but for completep."""
        return self.n_layers / (self.base_depth or self.n_layers)

    @property
    def query_multiplier(self) -> float:
        """The factor of queries that makes attention scores q k / D instead of q k / sqrt(D), up to a constant."""
        return math.sqrt((self.base_head_dim or self.head_size) / self.head_size)

    @property
    def vocab_rows(self) -> int:
        """The rows of the embedding and the head, V in the shapes of transformer.py."""
        return -(-self.vocab_size // 128) * 128 if self.padded_vocab_size is None else self.padded_vocab_size

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate, as all gated linear units (Shazeer 2020) do: their names end in glu."""
        return self.activation.endswith("glu")


@dataclass(frozen=True)
class AdapterConfig:
    """How much of the model is trained; model/adapter.py has the formulas. The defaults are PEFT's, but for all targets."""

    # none: all weights are trained; lora, dora: the weights of init_from are frozen, and small matrices beside them are trained
    kind: Literal["none", "lora", "dora"] = "none"
    rank: Count = 8  # rows of A and columns of B; the update of a matrix is B A
    alpha: Positive = 16.0  # the update is scaled by alpha / rank
    rank_stabilized: bool = False  # scale the update by alpha / sqrt(rank) instead
    targets: tuple[Target, ...] = get_args(Target)  # the matrices of each block that are adapted
    # the learning rate of B, and of DoRA's magnitudes, is N times that of A (LoRA+; 16 in the paper)
    lr_ratio: Ratio = 1.0

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("adapter.targets", f"is empty; name some of {', '.join(get_args(Target))}")
        if self.kind == "none" and self.lr_ratio != 1:
            raise ConfigError("adapter.lr_ratio", f"{self.lr_ratio:g} needs adapter.kind lora or dora; leave it out")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def is_on(self) -> bool:
        """Whether there are adapters, and so frozen weights."""
        return self.kind != "none"

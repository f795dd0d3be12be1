"""The model families of `transformers` that we convert to and from: rows of FAMILIES.

A family is a table of names and a table of settings. Tensors are renamed; Falcon alone keeps q, k and v as one, with the
rows in another order. One list of mappings serves both directions, and reads and writes one tensor at a time.

Sources of the names and of what each family computes: transformers' models/{olmo,olmo2,llama,gemma,falcon}/modeling_*.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olmo_train.errors import ConfigError, check_choice
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer


@dataclass(frozen=True)
class Mapping:
    """One tensor of theirs and the tensors of ours that it holds, one below the other."""

    theirs: str
    ours: tuple[str, ...]
    shapes: tuple[torch.Size, ...]  # of each of ours
    order: Tensor | None = None  # their row r is row order[r] of ours, joined; None: the same order

    @property
    def shape(self) -> torch.Size:
        """Of their tensor."""
        return torch.Size((sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]))

    def join(self, ours: list[Tensor]) -> Tensor:
        """Their tensor."""
        joined = ours[0] if len(ours) == 1 else torch.cat(ours)
        return joined if self.order is None else joined[self.order]

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """{name: tensor} of ours."""
        theirs = theirs if self.order is None else theirs[self.order.argsort()]
        return dict(zip(self.ours, theirs.split([shape[0] for shape in self.shapes]), strict=True))


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    architecture: str  # the class that loads it
    names: dict[str, str]  # our name, with {i} for the layer -> theirs; several of ours may be one of theirs
    settings: dict[str, str]  # their key -> the field or property of ModelConfig that has the same meaning
    constants: dict[str, Any]  # their keys that must have this value, and get it
    shape: dict[str, tuple]  # our fields of which the family knows these values only
    init: str  # of a new model of this family
    own_head_dim: bool = False  # the head size may differ from d_model / n_heads
    more_settings: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    more_fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda theirs: {}
    row_order: Callable[[ModelConfig], Tensor | None] = lambda config: None  # of a tensor that holds q, k and v


# ---- names

LLAMA_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "blocks.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.attn.wq.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blocks.{i}.attn.wk.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blocks.{i}.attn.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blocks.{i}.attn.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.mlp.w_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks.{i}.mlp.w_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blocks.{i}.mlp.w_down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
OLMO2_NAMES = LLAMA_NAMES | {
    "blocks.{i}.attn.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.attn.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "blocks.{i}.attn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_feedforward_layernorm.weight",
}
FALCON_NAMES = {
    "embed.weight": "transformer.word_embeddings.weight",
    "blocks.{i}.norm.weight": "transformer.h.{i}.input_layernorm.weight",
    "blocks.{i}.norm.bias": "transformer.h.{i}.input_layernorm.bias",
    "blocks.{i}.attn_norm.weight": "transformer.h.{i}.input_layernorm.weight",
    "blocks.{i}.attn_norm.bias": "transformer.h.{i}.input_layernorm.bias",
    "blocks.{i}.attn.wq.weight": "transformer.h.{i}.self_attention.query_key_value.weight",
    "blocks.{i}.attn.wk.weight": "transformer.h.{i}.self_attention.query_key_value.weight",
    "blocks.{i}.attn.wv.weight": "transformer.h.{i}.self_attention.query_key_value.weight",
    "blocks.{i}.attn.wo.weight": "transformer.h.{i}.self_attention.dense.weight",
    "blocks.{i}.mlp_norm.weight": "transformer.h.{i}.post_attention_layernorm.weight",
    "blocks.{i}.mlp_norm.bias": "transformer.h.{i}.post_attention_layernorm.bias",
    "blocks.{i}.mlp.w_up.weight": "transformer.h.{i}.mlp.dense_h_to_4h.weight",
    "blocks.{i}.mlp.w_down.weight": "transformer.h.{i}.mlp.dense_4h_to_h.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}

# ---- settings

COMMON_SETTINGS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "seq_len",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
LLAMA_SETTINGS = COMMON_SETTINGS | {"num_key_value_heads": "kv_heads", "intermediate_size": "mlp_hidden"}
COMMON_SHAPE = {"bias": ("none",), "qk_norm": (False,), "embedding_scale": (False,)}


def falcon_settings(config: ModelConfig) -> dict[str, Any]:
    grouped = 1 < config.kv_heads < config.n_heads
    return {
        "num_kv_heads": config.kv_heads,
        "multi_query": config.kv_heads == 1,
        "parallel_attn": config.block == "parallel",
        "new_decoder_architecture": grouped,  # the one that knows groups of heads; else multi_query or full attention
        "num_ln_in_parallel_attn": 1 if grouped else None,
    }


def falcon_fields(theirs: dict[str, Any]) -> dict[str, Any]:
    new = theirs["new_decoder_architecture"]
    if new and theirs["num_ln_in_parallel_attn"] != 1:
        raise ConfigError("num_ln_in_parallel_attn", "must be 1: model.block parallel has one norm for attention and MLP")
    kv_heads = theirs["num_kv_heads"] if new else 1 if theirs["multi_query"] else theirs["num_attention_heads"]
    return {"n_kv_heads": kv_heads, "block": "parallel" if new or theirs["parallel_attn"] else "sequential"}


def falcon_row_order(config: ModelConfig) -> Tensor:
    """Falcon keeps the q of each group of heads together with its k and v: (K, H/K + 2, D) rows."""
    H, K, D = config.n_heads, config.kv_heads, config.head_size
    rows = torch.arange((H + 2 * K) * D).view(-1, D)  # ours: H rows of heads q, K of k, K of v
    q, k, v = rows[:H].view(K, H // K, D), rows[H : H + K].view(K, 1, D), rows[H + K :].view(K, 1, D)
    return torch.cat((q, k, v), dim=1).flatten()


FAMILIES = {
    "olmo": Family(
        architecture="OlmoForCausalLM",
        names=LLAMA_NAMES,
        settings=LLAMA_SETTINGS | {"clip_qkv": "clip_qkv"},
        constants={"hidden_act": "silu", "attention_bias": False},
        shape=COMMON_SHAPE
        | {"norm": ("layer_norm_nonparametric",), "norm_eps": (1e-5,), "activation": ("swiglu",), "block": ("sequential",)},
        init="mitchell",
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        names=OLMO2_NAMES,
        settings=LLAMA_SETTINGS | {"rms_norm_eps": "norm_eps"},
        constants={"hidden_act": "silu", "attention_bias": False},
        shape=COMMON_SHAPE | {"norm": ("rms_norm",), "activation": ("swiglu",), "block": ("reordered_norm",), "qk_norm": (True,)},
        init="normal",
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        names=LLAMA_NAMES,
        settings=LLAMA_SETTINGS | {"rms_norm_eps": "norm_eps", "head_dim": "head_size"},
        constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        shape=COMMON_SHAPE | {"norm": ("rms_norm",), "activation": ("swiglu",), "block": ("sequential",)},
        init="normal",
        own_head_dim=True,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        names=LLAMA_NAMES,
        settings=LLAMA_SETTINGS | {"rms_norm_eps": "norm_eps", "head_dim": "head_size"},
        constants={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": None},
        shape=COMMON_SHAPE
        | {"norm": ("rms_norm_offset",), "activation": ("geglu",), "block": ("sequential",), "embedding_scale": (True,)},
        init="normal",
        own_head_dim=True,
    ),
    "falcon": Family(
        architecture="FalconForCausalLM",
        names=FALCON_NAMES,
        settings=COMMON_SETTINGS | {"layer_norm_epsilon": "norm_eps", "ffn_hidden_size": "mlp_hidden"},
        constants={"activation": "gelu", "alibi": False, "bias": False},
        shape=COMMON_SHAPE
        | {"norm": ("layer_norm",), "activation": ("gelu",), "block": ("parallel", "sequential"), "bias": ("norm",)},
        init="normal",
        more_settings=falcon_settings,
        more_fields=falcon_fields,
        row_order=falcon_row_order,
    ),
}


# ---- what may be converted


def refusals(name: str, config: ModelConfig) -> list[tuple[str, str]]:
    """[(our key, why the family cannot express its value)]; empty when it can express the model."""
    family, found = FAMILIES[name], []
    for key, known in family.shape.items():
        if getattr(config, key) not in known:
            found.append((key, f"{getattr(config, key)} cannot be expressed; {name} has {' or '.join(map(str, known))}"))
    if config.clip_qkv is not None and "clip_qkv" not in family.settings:
        found.append(("clip_qkv", f"{config.clip_qkv} cannot be expressed; {name} has none"))
    if not family.own_head_dim and config.head_size * config.n_heads != config.d_model:
        found.append(("head_dim", f"{config.head_size} cannot be expressed; {name} has d_model / n_heads"))
    if name == "llama" and config.d_model % config.n_heads:
        found.append(("n_heads", f"{config.n_heads} cannot be expressed; llama wants a divisor of d_model {config.d_model}"))
    if name == "falcon" and config.block == "sequential" and 1 < config.kv_heads < config.n_heads:
        found.append(("n_kv_heads", f"{config.kv_heads} cannot be expressed beside block: sequential; falcon has 1 or n_heads"))
    return found


def family_of(config: ModelConfig) -> str:
    """The family that can express the model. Raises ConfigError with the key that keeps the nearest one from it."""
    by_name = {name: refusals(name, config) for name in FAMILIES}
    nearest = min(by_name, key=lambda name: len(by_name[name]))
    for key, why in by_name[nearest]:
        raise ConfigError(f"model.{key}", f"{why}; no other family of {', '.join(FAMILIES)} is nearer")
    return nearest


# ---- settings


def to_settings(name: str, config: ModelConfig, eos_id: int | None, pad_id: int | None, dtype: str) -> dict[str, Any]:
    """The contents of config.json. Written so that transformers 4 and 5 read the same from it."""
    family = FAMILIES[name]
    theirs = {"architectures": [family.architecture], "model_type": name, "dtype": dtype}
    theirs |= {key: getattr(config, ours) for key, ours in family.settings.items()}
    theirs |= family.constants | family.more_settings(config)
    theirs |= {"vocab_size": config.vocab_rows, "bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return theirs | {"rope_theta": config.rope_theta, "rope_parameters": rope, "use_cache": True}


def to_config(theirs: dict[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """Our shape of a complete config.json, as transformers fills it up; `vocab_size` are the ids in use, by default every
    row of the embedding. Raises ConfigError with their key when we cannot express its value."""
    check_choice("model_type", theirs["model_type"], FAMILIES)
    family = FAMILIES[theirs["model_type"]]
    for key, value in family.constants.items():
        if theirs.get(key, value) != value:
            raise ConfigError(key, f"{theirs[key]!r} cannot be expressed; only {value!r} can")
    ours = {key: known[0] for key, known in family.shape.items()} | {"init": family.init}
    ours |= {field: theirs[key] for key, field in family.settings.items()}
    ours |= {"rope_theta": _rope_theta(theirs), "padded_vocab_size": theirs["vocab_size"]}
    ours["vocab_size"] = theirs["vocab_size"] if vocab_size is None else vocab_size
    head_size, kv_heads = ours.pop("head_size", None), ours.pop("kv_heads", None)
    if head_size is not None and head_size * ours["n_heads"] != ours["d_model"]:
        ours["head_dim"] = head_size
    ours = ours | {"n_kv_heads": kv_heads} | family.more_fields(theirs)
    if ours["n_kv_heads"] == ours["n_heads"]:
        ours["n_kv_heads"] = None
    return ModelConfig(**ours)


def _rope_theta(theirs: dict[str, Any]) -> float:
    """transformers 5 keeps rope_parameters, transformers 4 rope_theta and rope_scaling."""
    rope = theirs.get("rope_parameters") or {"rope_theta": theirs.get("rope_theta"), **(theirs.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("rope_parameters", f"{rope} cannot be expressed; only rope_type: default can")
    return float(rope["rope_theta"])


# ---- tensors


def mappings(name: str, config: ModelConfig) -> list[Mapping]:
    """Every tensor of theirs, in the model's order."""
    family, parts = FAMILIES[name], {}
    with torch.device("meta"):
        ours = {key: parameter.shape for key, parameter in Transformer(config).named_parameters()}
    for key in ours:
        layer = re.search(r"\.(\d+)\.", key)
        theirs = family.names[re.sub(r"\.\d+\.", ".{i}.", key)].replace("{i}", layer[1] if layer else "")
        parts.setdefault(theirs, []).append(key)
    return [
        Mapping(theirs, tuple(keys), tuple(ours[key] for key in keys), family.row_order(config) if len(keys) > 1 else None)
        for theirs, keys in parts.items()
    ]

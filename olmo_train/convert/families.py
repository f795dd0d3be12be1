"""The model families of `transformers` that we convert to and from: one row of FAMILIES each.

A row has a table of tensor names and a table of configuration keys, and both serve export and import. Tensors are renamed;
Falcon alone stores q, k and v stacked, with the rows in another order.

Sources of the names and of what each family computes: transformers' models/{olmo,olmo2,llama,gemma,falcon}/modeling_*.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from olmo_train.config import build
from olmo_train.convert.folders import Read, on_meta
from olmo_train.errors import ConfigError, check_choice
from olmo_train.model.config import ModelConfig


@dataclass(frozen=True)
class Mapping:
    """One tensor of theirs and our tensors that it holds, one below the other."""

    theirs: str
    ours: tuple[str, ...]
    shapes: tuple[torch.Size, ...]  # of each of ours
    order: Tensor | None = None  # row r of theirs is row order[r] of ours, stacked; None: the same order

    @property
    def shape(self) -> torch.Size:
        """The shape of their tensor."""
        return torch.Size((sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]))

    def join(self, ours: list[Tensor]) -> Tensor:
        """Their tensor, from ours."""
        joined = ours[0] if len(ours) == 1 else torch.cat(ours)
        return joined if self.order is None else joined[self.order]

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """{name: tensor} of ours, from theirs."""
        theirs = theirs if self.order is None else theirs[self.order.argsort()]
        return dict(zip(self.ours, theirs.split([shape[0] for shape in self.shapes]), strict=True))


def pair(names: dict[str, str], config: ModelConfig, order: Tensor | None = None) -> list[Mapping]:
    """The tensors of theirs that hold the weights of a model, by a table {our name: their name}, with {i} for the layer.

    Of our names that share one of theirs, the first in the table has the first rows; `order` applies to these.
    """
    shapes = {name: parameter.shape for name, parameter in on_meta(config).named_parameters()}
    parts: dict[str, dict[str, torch.Size]] = {}
    for i in range(config.n_layers):
        for ours, theirs in names.items():
            if (name := ours.format(i=i)) in shapes:
                parts.setdefault(theirs.format(i=i), {})[name] = shapes[name]
    mapped = {name for held in parts.values() for name in held}
    assert mapped == shapes.keys(), f"no name for {sorted(shapes.keys() - mapped)}"
    return [
        Mapping(theirs, tuple(held), tuple(held.values()), order if len(held) > 1 else None) for theirs, held in parts.items()
    ]


def reader(mappings: list[Mapping], theirs: Read) -> Read:
    """Reads our tensors, in fp32, out of theirs."""
    holders = {name: mapping for mapping in mappings for name in mapping.ours}
    return lambda name: holders[name].split(theirs(holders[name].theirs))[name].float()


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    architecture: str  # the class that loads it
    names: dict[str, str]  # as in `pair`
    settings: dict[str, str | Callable[[ModelConfig], Any]]  # their key -> our field or property, or a function of ours
    constants: dict[str, Any]  # their keys that must have this value
    shape: dict[str, tuple]  # our fields with the values that the family can express; an import takes the first
    init: str = "normal"  # of a new model of this family
    fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda theirs: {}  # our fields that follow from several keys of theirs
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
    "vocab_size": "vocab_rows",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "seq_len",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
LLAMA_SETTINGS = COMMON_SETTINGS | {"num_key_value_heads": "kv_heads", "intermediate_size": "mlp_hidden"}
PROPERTIES = {"vocab_rows": "padded_vocab_size", "kv_heads": "n_kv_heads", "head_size": "head_dim"}  # of ModelConfig -> its field
COMMON_SHAPE = {"bias": ("none",), "qk_norm": (False,), "embedding_scale": (False,), "clip_qkv": (None,)}


def is_grouped(config: ModelConfig) -> bool:
    """Whether several query heads share a key and value head, but not all of them."""
    return 1 < config.kv_heads < config.n_heads


def falcon_fields(theirs: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig that follow from several keys of Falcon's configuration. Raises ConfigError."""
    new = theirs["new_decoder_architecture"]
    if new and theirs["num_ln_in_parallel_attn"] != 1:
        raise ConfigError("num_ln_in_parallel_attn", "must be 1: model.block parallel has one norm for attention and MLP")
    kv_heads = theirs["num_kv_heads"] if new else 1 if theirs["multi_query"] else theirs["num_attention_heads"]
    return {"n_kv_heads": kv_heads, "block": "parallel" if new or theirs["parallel_attn"] else "sequential"}


def falcon_row_order(config: ModelConfig) -> Tensor:
    """Falcon stores the q of each group of heads together with its k and v: (K, H/K + 2, D) rows."""
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
        shape={
            "norm": ("layer_norm_nonparametric",),
            "norm_eps": (1e-5,),
            "activation": ("swiglu",),
            "block": ("sequential",),
            "bias": ("none",),
            "qk_norm": (False,),
            "embedding_scale": (False,),
        },
        init="mitchell",
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        names=OLMO2_NAMES,
        settings=LLAMA_SETTINGS | {"rms_norm_eps": "norm_eps"},
        constants={"hidden_act": "silu", "attention_bias": False},
        shape=COMMON_SHAPE | {"norm": ("rms_norm",), "activation": ("swiglu",), "block": ("reordered_norm",), "qk_norm": (True,)},
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        names=LLAMA_NAMES,
        settings=LLAMA_SETTINGS | {"rms_norm_eps": "norm_eps", "head_dim": "head_size"},
        constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        shape=COMMON_SHAPE | {"norm": ("rms_norm",), "activation": ("swiglu",), "block": ("sequential",)},
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        names=LLAMA_NAMES,
        settings=LLAMA_SETTINGS | {"rms_norm_eps": "norm_eps", "head_dim": "head_size"},
        constants={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": None},
        shape=COMMON_SHAPE
        | {"norm": ("rms_norm_offset",), "activation": ("geglu",), "block": ("sequential",), "embedding_scale": (True,)},
    ),
    "falcon": Family(
        architecture="FalconForCausalLM",
        names=FALCON_NAMES,
        settings=COMMON_SETTINGS
        | {
            "layer_norm_epsilon": "norm_eps",
            "ffn_hidden_size": "mlp_hidden",
            "num_kv_heads": "kv_heads",
            "multi_query": lambda config: config.kv_heads == 1,
            "parallel_attn": lambda config: config.block == "parallel",
            "new_decoder_architecture": is_grouped,  # the one with groups of heads; otherwise multi-query or full attention
            "num_ln_in_parallel_attn": lambda config: 1 if is_grouped(config) else None,
        },
        constants={"activation": "gelu", "alibi": False, "bias": False},
        shape=COMMON_SHAPE
        | {"norm": ("layer_norm",), "activation": ("gelu",), "block": ("parallel", "sequential"), "bias": ("norm",)},
        fields=falcon_fields,
        row_order=falcon_row_order,
    ),
}


# ---- conversions by the row of a family


def refusals(name: str, config: ModelConfig) -> list[tuple[str, str]]:
    """[(our key, why the family cannot express its value)]; empty when it can express the model."""
    family = FAMILIES[name]
    found = [
        (key, f"{name} has {known_values(known)}") for key, known in family.shape.items() if getattr(config, key) not in known
    ]
    if "head_dim" not in family.settings and config.head_size * config.n_heads != config.d_model:
        found.append(("head_dim", f"{name} has d_model / n_heads"))
    if name == "llama" and config.d_model % config.n_heads:
        found.append(("n_heads", f"llama needs a divisor of d_model {config.d_model}"))
    if name == "falcon" and config.block == "sequential" and is_grouped(config):
        found.append(("n_kv_heads", "falcon has 1 or n_heads beside block: sequential"))
    return found


def family_of(config: ModelConfig) -> str:
    """The family that can express the model. Raises ConfigError with the key that the nearest family cannot express."""
    by_name = {name: refusals(name, config) for name in FAMILIES}
    nearest = min(by_name, key=lambda name: len(by_name[name]))
    for key, why in by_name[nearest]:
        value = config.head_size if key == "head_dim" else getattr(config, key)
        raise ConfigError(
            f"model.{key}", f"{value} cannot be expressed; {why}; no other family of {', '.join(FAMILIES)} is nearer"
        )
    return nearest


def known_values(values: tuple) -> str:
    """Values as YAML writes them: `null or 0`."""
    return " or ".join("null" if value is None else str(value).lower() for value in values)


def mappings(name: str, config: ModelConfig) -> list[Mapping]:
    """Every tensor of theirs."""
    family = FAMILIES[name]
    return pair(family.names, config, family.row_order(config))


def to_settings(name: str, config: ModelConfig, eos_id: int | None, pad_id: int | None, dtype: str) -> dict[str, Any]:
    """The contents of config.json. Written so that transformers 4 and 5 read the same from it."""
    family = FAMILIES[name]
    theirs = {"architectures": [family.architecture], "model_type": name, "dtype": dtype} | family.constants
    theirs |= {key: getattr(config, ours) if isinstance(ours, str) else ours(config) for key, ours in family.settings.items()}
    theirs |= {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id, "use_cache": True}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return theirs | {"rope_theta": config.rope_theta, "rope_parameters": rope}


def to_config(theirs: dict[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """Our shape of a complete config.json, as transformers fills it up; `vocab_size` is the number of ids in use, by default
    every row of the embedding. Raises ConfigError with their key when we cannot express its value."""
    check_choice("model_type", theirs["model_type"], FAMILIES)
    family = FAMILIES[theirs["model_type"]]
    for key, value in family.constants.items():
        if theirs.get(key, value) != value:
            raise ConfigError(key, f"{theirs[key]!r} cannot be expressed; only {value!r} can")
    ours = {field: known[0] for field, known in family.shape.items()}
    ours |= {PROPERTIES.get(name, name): theirs[key] for key, name in family.settings.items() if isinstance(name, str)}
    ours |= {"init": family.init, "rope_theta": _rope_theta(theirs), **family.fields(theirs)}
    ours["vocab_size"] = theirs["vocab_size"] if vocab_size is None else vocab_size
    for field, default in (("n_kv_heads", ours["n_heads"]), ("head_dim", ours["d_model"] / ours["n_heads"])):
        if ours.get(field) == default:  # what null means
            ours[field] = None
    return build(ModelConfig, ours, "model")


def _rope_theta(theirs: dict[str, Any]) -> float:
    """transformers 5 has rope_parameters, transformers 4 rope_theta and rope_scaling."""
    rope = theirs.get("rope_parameters") or {"rope_theta": theirs.get("rope_theta"), **(theirs.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("rope_parameters", f"{rope} cannot be expressed; only rope_type: default can")
    return float(rope["rope_theta"])


# ---- multipliers


def folded(config: ModelConfig, read: Read) -> tuple[ModelConfig, Read]:
    """The same model under the standard parametrization, as (shape, weights by name): the multipliers of mup and completep are
    folded into the weights. A tied head that has a multiplier becomes a separate matrix.

    Raises ConfigError where no weight can take a multiplier.
    """
    standard = {"parametrization": "standard", "base_width": None, "base_depth": None, "base_head_dim": None}
    untied = config.tie_embeddings and config.width_ratio != 1
    factors = _factors(config)

    def read_folded(name: str) -> Tensor:
        value = read("embed.weight" if untied and name == "head.weight" else name)
        factor = factors.get(re.sub(r"^blocks\.\d+\.|\.(weight|bias)$", "", name), 1.0)
        if factor == 1:
            return value
        offset = 1 if config.norm == "rms_norm_offset" and name.endswith("norm.weight") else 0  # it multiplies by 1 + weight
        return (value + offset) * factor - offset

    return replace(config, tie_embeddings=config.tie_embeddings and not untied, **standard), read_folded


def _factors(config: ModelConfig) -> dict[str, float]:
    """{name in a block, or head: factor} of the weights that take the multipliers."""
    bare = config.norm == "layer_norm_nonparametric"
    queries, branches, head = config.query_multiplier, 1 / config.depth_ratio, 1 / config.width_ratio
    if queries != 1 and (config.clip_qkv is not None or (config.qk_norm and bare)):
        key = "qk_norm" if config.clip_qkv is None else "clip_qkv"
        what = "the factor of its queries, which base_head_dim causes, comes later and fits in no weight"
        raise ConfigError(f"model.{key}", f"cannot be exported with parametrization {config.parametrization}: {what}")
    if branches != 1 and config.block == "reordered_norm" and bare:
        what = "the factor of its branches comes after a norm without weights"
        raise ConfigError("model.block", f"reordered_norm cannot be exported with parametrization completep: {what}")
    ends = ("attn_norm", "mlp_norm") if config.block == "reordered_norm" else ("attn.wo", "mlp.w_down")
    return {"attn.q_norm" if config.qk_norm else "attn.wq": queries, **dict.fromkeys(ends, branches), "head": head}

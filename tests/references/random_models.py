"""Tiny models of every family with random weights, as checkpoint folders: what conversions are tried on."""

from pathlib import Path

import torch

from olmo_train import config as configuration
from olmo_train.convert import folders
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer
from olmo_train.storage import commit_folder

OLMO = {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden": 96, "vocab_size": 512, "padded_vocab_size": 512, "seq_len": 80}
OLMO2 = OLMO | {
    "norm": "rms_norm",
    "norm_eps": 1e-6,
    "qk_norm": True,
    "block": "reordered_norm",
    "rope_theta": 5e5,
    "init": "normal",
}
LLAMA = OLMO | {"norm": "rms_norm", "init": "normal"}
GEMMA = OLMO | {"norm": "rms_norm_offset", "norm_eps": 1e-6, "activation": "geglu", "embedding_scale": True,
                "tie_embeddings": True, "n_kv_heads": 1, "head_dim": 32, "init": "normal"}  # fmt: skip
FALCON = OLMO | {"norm": "layer_norm", "bias": "norm", "activation": "gelu", "block": "parallel", "n_kv_heads": 1,
                 "init": "normal"}  # fmt: skip

VARIANTS = {
    "olmo": OLMO,
    "olmo tied": OLMO | {"tie_embeddings": True},
    "olmo clipped, GQA, other theta": OLMO | {"clip_qkv": 0.5, "n_kv_heads": 2, "rope_theta": 500.0},
    "olmo MQA, padded vocabulary": OLMO | {"n_kv_heads": 1, "vocab_size": 450},
    "olmo2": OLMO2,
    "olmo2 GQA, tied": OLMO2 | {"n_kv_heads": 2, "tie_embeddings": True},
    "llama": LLAMA,
    "llama GQA, wide heads, eps 1e-3": LLAMA | {"n_kv_heads": 2, "head_dim": 32, "norm_eps": 1e-3},
    "gemma MQA": GEMMA,
    "gemma full attention, untied": GEMMA | {"n_kv_heads": 4, "tie_embeddings": False},
    "falcon MQA": FALCON,
    "falcon GQA, tied": FALCON | {"n_kv_heads": 2, "tie_embeddings": True},
    "falcon sequential, full attention": FALCON | {"n_kv_heads": 4, "block": "sequential"},
}


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """{name: value}: no two matrices alike, norms far enough from the identity to be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    return {name: random_weight(name, shape, config, generator) for name, shape in shapes.items()}


def random_weight(name: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    value = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return 0.1 * value
    around = 1.0 if name.endswith("weight") and config.norm != "rms_norm_offset" else 0.0
    return around + 0.3 * value


def write_random_checkpoint(folder: Path, config: ModelConfig, files: dict[str, bytes] | None = None) -> dict[str, torch.Tensor]:
    """Write a checkpoint of random weights; returns them."""
    weights = random_weights(config)
    temporary = folder.with_name(f".{folder.name}")
    temporary.mkdir(parents=True)
    values = {"model": configuration.to_dict(config)}
    commit_folder(temporary, folder, folders.write_checkpoint(temporary, config, values, weights.__getitem__, files or {}))
    return weights

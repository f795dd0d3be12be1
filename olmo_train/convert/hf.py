"""Checkpoints to and from `transformers` folders, tensor by tensor, proven by their logits.

A folder gets its final name only after the logits of the written model match those of the source. Both models run block by
block, so neither is ever entirely in memory.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_train import config as configuration
from olmo_train.checkpoint import folders, load
from olmo_train.convert import families
from olmo_train.convert.check import Agreement, check_logits, compare, our_logits
from olmo_train.convert.folders import Read, TheirWeights, new_folder, transformers, write_checkpoint, write_shards
from olmo_train.data.templates import chat_template, template_for
from olmo_train.data.tokenizer import (
    CONFIG_FILE,
    OTHER_TOKENIZER,
    PAD_TEXT,
    Tokenizer,
    check_same_tokenizer,
    config_file,
    load_tokenizer,
    record_of_folder,
)
from olmo_train.errors import CheckpointError, ConfigError, DataError
from olmo_train.model.config import ModelConfig
from olmo_train.storage import commit_folder, write_file

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---- the conversions


def export_hf(
    source: Path, dest: Path, dtype: str = "fp32", tokenizer: Tokenizer | None = None, check_tokenizer: bool = True,
    moved_base: Path | None = None,
) -> Agreement:  # fmt: skip
    """Write a checkpoint as a folder that transformers loads. The tokenizer is the checkpoint's own unless you pass one.
    `moved_base`: where the base of adapters is now, if it has moved.

    Raises ConfigError with the key that no family expresses, CheckpointError when the logits do not agree, and, with
    `check_tokenizer`, DataError when the tokenizer is not the checkpoint's: the logits, of ids, could not show it.
    """
    transformers()
    folder = folders.resolve(source)
    if moved_base and "base" not in folders.read_state(folder):
        raise ConfigError("--base", f"goes with a run with adapters, and {folder} holds all weights; leave it out")
    saved = configuration.read([folder / "config.yaml"])
    config = configuration.build(ModelConfig, saved["model"], "model")
    own = folder / "tokenizer.json"
    if tokenizer:
        records = [record_of_folder(folder), tokenizer.record("--tokenizer")]
        check_same_tokenizer(records, check_tokenizer, OTHER_TOKENIZER)
    if tokenizer is None and own.is_file():
        tokenizer = load_tokenizer(own)
    eos_id = tokenizer.eos_id if tokenizer else configuration.decoded(saved.get("data") or {}).get("eos_id")
    stored = load.WeightReader(folder, moved_base)
    template = template_for(folder, tokenizer) if tokenizer else None
    shape, folded = families.folded(config, stored)
    family = families.family_of(shape)

    def read(name: str) -> Tensor:
        return folded(name).to(DTYPES[dtype])

    with new_folder(dest) as temporary:
        for name, content in _text_files(family, shape, tokenizer, eos_id, DTYPES[dtype], template).items():
            write_file(temporary / name, content)
        _write_their_weights(temporary, family, shape, read, DTYPES[dtype])
        if dtype == "fp32":  # with adapters, of the model as it was trained
            agreement = check_logits(config, stored.unmerged, temporary, source, stored.adapter)
        else:
            agreement = _check_rounded(config, stored, shape, read, temporary, source)
        commit_folder(temporary, dest)
    return agreement


def _check_rounded(
    config: ModelConfig, stored: load.WeightReader, shape: ModelConfig, written: Read, folder: Path, source: Path
) -> Agreement:
    """Compare logits of a folder whose weights are rounded with those of the weights as they were written, of a model of `shape`.
    Adapters also show how far rounding the merged weights moves the logits."""

    def rounded(name: str) -> Tensor:
        return written(name).float()

    agreement = check_logits(shape, rounded, folder, source)
    if stored.adapter.is_on:
        adapted = our_logits(config, stored.unmerged, stored.adapter)
        agreement = replace(agreement, lost=compare(our_logits(shape, rounded), adapted, config).relative)
    return agreement


def import_hf(source: Path, dest: Path) -> Agreement:
    """Write a transformers folder as a checkpoint. Its tokenizer.json comes along when it has one that we can use.

    Raises ConfigError with their key that we cannot express, CheckpointError when the weights are not as they should be
    or the logits do not agree.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(source, "holds no config.json; name a folder that transformers' save_pretrained wrote")
    settings = transformers().AutoConfig.from_pretrained(source).to_dict()
    tokenizer = their_tokenizer(source)
    config = families.to_config(settings, tokenizer.vocab_size if tokenizer else None)
    mappings = families.mappings(settings["model_type"], config)
    theirs = TheirWeights(source)
    derived = [name for name in theirs.shapes if name.endswith("rotary_emb.inv_freq")]  # computed from the configuration
    derived += ["lm_head.weight"] if config.tie_embeddings else []
    shapes = {name: shape for name, shape in theirs.shapes.items() if name not in derived}
    load.check_shapes(source, shapes, {mapping.theirs: mapping.shape for mapping in mappings})
    files = {"tokenizer.json": tokenizer.json.encode(), CONFIG_FILE: their_config(source, tokenizer)} if tokenizer else {}
    with new_folder(dest) as temporary:
        values = {"model": configuration.to_dict(config)}
        entries = write_checkpoint(temporary, config, values, families.reader(mappings, theirs), files)
        agreement = check_logits(config, load.WeightReader(temporary), source, source)
        commit_folder(temporary, dest, entries)
    return agreement


# ---- files of a transformers folder


def _write_their_weights(folder: Path, family: str, config: ModelConfig, read: Read, dtype: torch.dtype) -> None:
    mappings = {mapping.theirs: mapping for mapping in families.mappings(family, config)}
    sizes = {name: mapping.shape.numel() * dtype.itemsize for name, mapping in mappings.items()}
    entries, where = write_shards(folder, sizes, lambda name: mappings[name].join([read(part) for part in mappings[name].ours]))
    if len(entries) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())


def _text_files(
    family: str,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    eos_id: int | None,
    dtype: torch.dtype,
    template: dict[str, Any] | None,
) -> dict[str, bytes]:
    """The JSON files of a transformers folder."""
    pad_id = _pad_id(tokenizer) if tokenizer else eos_id
    settings = families.to_settings(family, config, eos_id, pad_id, str(dtype).removeprefix("torch."))
    generation = {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id}
    n_tokens = tokenizer.vocab_size if tokenizer else config.vocab_size
    if config.vocab_rows > n_tokens:  # ids without a token, and rows of padding
        generation["suppress_tokens"] = list(range(n_tokens, config.vocab_rows))
    files = {"config.json": settings, "generation_config.json": generation}
    texts = {name: json.dumps(values, indent=1).encode() for name, values in files.items()}
    return texts | (tokenizer_files(tokenizer, config, template) if tokenizer else {})


def tokenizer_files(tokenizer: Tokenizer, config: ModelConfig, template: dict[str, Any] | None) -> dict[str, bytes]:
    """The files with which transformers opens a tokenizer, and with `template`, that of the data, applies a chat template. The
    record of the template comes along for an import. Raises ConfigError when the model has fewer ids."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError("--tokenizer", f"{tokenizer.name} has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    chat = chat_template(template, tokenizer) if template else None
    about = config_file(
        tokenizer.eos_text,
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token=tokenizer.inner.id_to_token(_pad_id(tokenizer)),
        padding_side="left",  # text is continued at its right end
        model_max_length=config.seq_len,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
        **({"chat_template": chat} if chat else {}),
        **({"template": template} if template else {}),
    )
    return {"tokenizer.json": tokenizer.json.encode(), CONFIG_FILE: about}


def _pad_id(tokenizer: Tokenizer) -> int:
    pad_id = tokenizer.inner.token_to_id(PAD_TEXT)
    return tokenizer.eos_id if pad_id is None else pad_id


def their_config(folder: Path, tokenizer: Tokenizer) -> bytes:
    """Contents of the tokenizer_config.json of a checkpoint with the tokenizer of a folder, and with its template if this program
    exported it."""
    template = template_for(folder, tokenizer)
    return config_file(tokenizer.eos_text, **({"template": template} if template else {}))


def their_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, if it has one that we can use."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return load_tokenizer(file)
    except DataError as problem:
        log.warning("%s; the checkpoint gets no tokenizer", problem)
        return None

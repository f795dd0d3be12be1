"""Folders that conversions write and read: shards of weights, and a checkpoint from single tensors."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from olmo_train import config as configuration
from olmo_train.checkpoint.format import FORMAT
from olmo_train.errors import CheckpointError, ConfigError, reason
from olmo_train.model.adapter import adapt, own_parameters
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import FULL
from olmo_train.model.transformer import Transformer
from olmo_train.storage import temporary_folder, write_file

SHARD_BYTES = 1 << 30  # bytes in one file of weights; a file is in memory while it is written

Read = Callable[[str], Tensor]  # reads a tensor by its name


def transformers() -> Any:
    """The package, imported. Raises ConfigError when it is not installed."""
    try:
        import transformers
    except ImportError as problem:
        what = f"compares logits with transformers, which cannot be imported ({problem}); pip install 'olmo-train[convert]'"
        raise ConfigError("convert", what) from problem
    transformers.utils.logging.set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):  # transformers loads torchao, which warns about GPU kernels and its own enums
        logging.getLogger(name).setLevel(logging.ERROR)
    return transformers


def on_meta(config: ModelConfig, adapter: AdapterConfig = FULL) -> Transformer:
    """The model on the meta device, with its adapters: its shapes, without memory for its weights."""
    with torch.device("meta"):
        return adapt(Transformer(config), adapter) if adapter.is_on else Transformer(config)


# ---- folders


@contextlib.contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder beside `dest` to write in; the block renames it. Nothing stays behind an error."""
    if dest.resolve() == Path.cwd():  # a rename would leave the user's shell in a removed folder
        raise ConfigError(dest, "is the working directory; name a new folder")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ConfigError(dest, "exists already; name a new folder")
    with contextlib.ExitStack() as stack:
        try:
            temporary = temporary_folder(dest)
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            yield temporary
        except OSError as problem:
            raise ConfigError(dest, f"cannot be written: {reason(problem)}; name another place") from problem


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    values: dict[str, Any],
    read: Read,
    files: dict[str, bytes],
    step: int = 0,
    updates: int | None = None,
    moments: dict[str, Read] | None = None,
    adapter: AdapterConfig = FULL,
    base: dict[str, Any] | None = None,
) -> dict[str, dict]:
    """Write the files of a checkpoint; returns their manifest entries.

    `values` is its config.yaml, `files` are written as they are. A run with resume_from continues after `step`: with the
    `moments` of AdamW, {exp_avg, exp_avg_sq: reader}, after `updates` updates; without them, with a new optimizer.
    With an `adapter` the checkpoint holds the adapters alone, and `base` is what state.json says of the frozen weights.
    """
    kinds = {"model.{}": read} | {f"optim.{{}}.{key}": moment for key, moment in (moments or {}).items()}
    parameters = own_parameters(on_meta(config, adapter))
    tensors = {kind.format(name): partial(source, name) for kind, source in kinds.items() for name in parameters}
    sizes = {kind.format(name): 4 * parameter.numel() for kind in kinds for name, parameter in parameters.items()}
    entries, _ = write_shards(folder, sizes, lambda name: tensors[name]())
    state = {"format": FORMAT, "attempt": 0, "world_size": 1, "data": {}, "interval": None, "pending_line": None}
    state |= {"total_tokens": 0, "step": step, "optimizer_steps": updates} | ({"base": base} if base else {})
    texts = {"config.yaml": configuration.dump(values).encode(), "state.json": json.dumps(state, indent=1).encode(), **files}
    return entries | {name: write_file(folder / name, content) for name, content in texts.items()}


def write_shards(folder: Path, sizes: dict[str, int], read: Read) -> tuple[dict[str, dict], dict[str, str]]:
    """Write tensors of these sizes in bytes into files of about SHARD_BYTES; returns the manifest entry of each file, and
    the file of each tensor."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= size
    entries, where = {}, {}
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        content = safetensors.torch.save({name: read(name).contiguous() for name in names}, metadata={"format": "pt"})
        entries[file] = write_file(folder / file, content)
        where |= dict.fromkeys(names, file)
    return entries, where


class TheirWeights:
    """Reads the tensors of a transformers folder one at a time. Pickled weights are never opened."""

    def __init__(self, folder: Path):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if not index.is_file() and not single.is_file():
            raise CheckpointError(folder, "holds no model.safetensors; save it again with safe_serialization=True")
        files = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else {single.name}
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safetensors.safe_open(folder / file, "pt") as tensors:
                names = tensors.keys()
                self.files |= dict.fromkeys(names, folder / file)
                self.shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}

    def __call__(self, name: str) -> Tensor:
        with safetensors.safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

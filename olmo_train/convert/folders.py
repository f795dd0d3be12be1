"""Folders that conversions write and read: shards of weights, and a checkpoint from single tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from olmo_train import config as configuration
from olmo_train.checkpoint.format import FORMAT
from olmo_train.convert import families
from olmo_train.errors import CheckpointError, ConfigError
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer
from olmo_train.storage import write_file

SHARD_BYTES = 1 << 30  # of one file of weights, which is in memory while it is written

Read = Callable[[str], Tensor]  # the tensor that is called so


def transformers() -> Any:
    """The package, imported. Raises ConfigError when it is not installed."""
    try:
        import transformers
    except ImportError as problem:
        what = f"compares logits with transformers, which cannot be imported ({problem}); pip install 'olmo-train[convert]'"
        raise ConfigError("convert", what) from problem
    transformers.utils.logging.set_verbosity_error()
    return transformers


# ---- folders


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder beside `dest` to write in; the block renames it. Nothing stays behind an error."""
    if dest.resolve() == Path.cwd():  # which a rename would take from under the user's shell
        raise ConfigError(dest, "is the working directory; name a new folder")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ConfigError(dest, "exists already; name a new folder")
    temporary = dest.with_name(f".{dest.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that died
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as problem:
        raise ConfigError(dest, f"cannot be written: {problem}; name another place") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    values: dict[str, Any],
    read: Read,
    files: dict[str, bytes],
    step: int = 0,
    updates: int | None = None,
    read_moment: Callable[[str, str], Tensor] | None = None,
) -> dict[str, dict]:
    """Write the files of a checkpoint; returns their manifest entries.

    `values` is its config.yaml, `files` go in as they are. With resume_from, a run goes on after `step`: with AdamW's
    moments, which `updates` updates have made, or, where that is None, with a new optimizer.
    """
    sizes = {f"model.{name}": 4 * parameter.numel() for name, parameter in _on_meta(config).named_parameters()}
    if updates is not None:
        sizes |= {f"optim.{n[6:]}.{key}": size for n, size in sizes.items() for key in ("exp_avg", "exp_avg_sq")}

    def read_any(name: str) -> Tensor:
        kind, _, rest = name.partition(".")
        return read(rest) if kind == "model" else read_moment(*rest.rsplit(".", 1))

    entries, _ = _write_shards(folder, sizes, read_any)
    state = {"format": FORMAT, "attempt": 0, "world_size": 1, "data": {}, "interval": None, "pending_line": None}
    state |= {"total_tokens": 0, "step": step, "optimizer_steps": updates}
    texts = {"config.yaml": configuration.dump(values).encode(), "state.json": json.dumps(state, indent=1).encode(), **files}
    return entries | {name: write_file(folder / name, content) for name, content in texts.items()}


def _write_shards(folder: Path, sizes: dict[str, int], read: Read) -> tuple[dict[str, dict], dict[str, str]]:
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
        self.folder = folder
        if index.is_file():
            self.files = {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        elif single.is_file():
            with safetensors.safe_open(single, "pt") as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            raise CheckpointError(folder, "holds no model.safetensors; save it again with safe_serialization=True")

    def __call__(self, name: str) -> Tensor:
        with safetensors.safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def check(self, mappings: list[families.Mapping], config: ModelConfig) -> None:
        """Raises CheckpointError unless exactly the tensors of this model are there, in their shapes."""
        wanted = {mapping.theirs: list(mapping.shape) for mapping in mappings}
        for name in sorted(wanted.keys() | {name for name in self.files if not self._is_derived(name, config)}):
            found = self._shape(name)
            if found != wanted.get(name):
                raise CheckpointError(self.folder, f"{name} is {found or 'absent'}, expected {wanted.get(name) or 'absent'}")

    def _shape(self, name: str) -> list[int] | None:
        if name not in self.files:
            return None
        with safetensors.safe_open(self.files[name], "pt") as file:
            return list(file.get_slice(name).get_shape())

    def _is_derived(self, name: str, config: ModelConfig) -> bool:
        """Tensors that some folders keep though they follow from others."""
        return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)

"""Checkpoints to and from `transformers` folders, tensor by tensor, proven by their logits.

The one idea: nothing is believed. A folder gets its name only after the logits of what was written have been compared
with those of what was read. Both models run block by block, so that neither is ever in memory as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from olmo_train import checkpoint as checkpoints
from olmo_train import config as configuration
from olmo_train.checkpoint_format import FORMAT
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
from olmo_train.errors import CheckpointError, ConfigError, DataError, check_choice
from olmo_train.model import hf, olmo
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer
from olmo_train.storage import commit_folder, flush_folder, replace_file, write_file

log = logging.getLogger(__name__)
SHARD_BYTES = 1 << 30  # of one file of weights, which is in memory while it is written
MAX_DIFFERENCE = 2e-5  # between logits of size 1, computed in fp32; gate and up swapped give 1 and more
MAX_RELATIVE = 5e-6  # |difference| / |logits|, over all of them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Read = Callable[[str], Tensor]  # the tensor that is called so


@dataclass(frozen=True)
class Agreement:
    """How near the logits of the copy are to those of the original, on the same tokens."""

    difference: float  # the largest
    relative: float
    largest: float  # logit
    n_layers: int

    @property
    def holds(self) -> bool:
        deep = max(1.0, self.n_layers / 8) ** 0.5  # rounding adds up over layers: measured 1.3e-6 at 3 and 2.0e-6 at 9
        is_near = self.difference <= MAX_DIFFERENCE * deep * max(1.0, self.largest)
        return is_near and self.relative <= MAX_RELATIVE * deep

    def __str__(self) -> str:
        return f"logits differ by at most {self.difference:.1e}, relative {self.relative:.1e}"


# ---- the conversions


def export_hf(
    source: Path, dest: Path, dtype: str = "fp32", tokenizer: Tokenizer | None = None, check_tokenizer: bool = True
) -> Agreement:
    """Write a checkpoint as a folder that transformers loads. The tokenizer is the checkpoint's own unless one is given.

    Raises ConfigError with the key that no family expresses, CheckpointError when the logits do not agree, and, with
    `check_tokenizer`, DataError when the tokenizer is not the checkpoint's: the logits, of ids, could not show it.
    """
    transformers()
    folder = checkpoints.resolve(source)
    saved = configuration.read([folder / "config.yaml"])
    config = configuration.build(ModelConfig, saved["model"], "model")
    family = hf.family_of(config)
    own = folder / "tokenizer.json"
    if tokenizer:
        records = [record_of_folder(folder), tokenizer.record("--tokenizer")]
        check_same_tokenizer(records, check_tokenizer, OTHER_TOKENIZER)
    if tokenizer is None and own.is_file():
        tokenizer = load_tokenizer(own)
    eos_id = tokenizer.eos_id if tokenizer else configuration.decoded(saved.get("data") or {}).get("eos_id")
    stored = checkpoints.WeightReader(folder)

    def read(name: str) -> Tensor:
        return stored(name).to(DTYPES[dtype])

    with new_folder(dest) as temporary:
        for name, content in _text_files(family, config, tokenizer, eos_id, DTYPES[dtype]).items():
            write_file(temporary / name, content)
        _write_their_weights(temporary, family, config, read, DTYPES[dtype])
        agreement = compare(config, lambda name: read(name).float(), temporary)
        _require(agreement, source)
        os.rename(temporary, dest)
        flush_folder(dest.parent)
    return agreement


def import_hf(source: Path, dest: Path) -> Agreement:
    """Write a transformers folder as a checkpoint. Its tokenizer.json comes along when it has one that we can use.

    Raises ConfigError with their key that we cannot express, CheckpointError when the weights are not as they should be
    or the logits do not agree.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(source, "holds no config.json; name a folder that transformers' save_pretrained wrote")
    settings = transformers().AutoConfig.from_pretrained(source).to_dict()
    tokenizer = _their_tokenizer(source)
    config = hf.to_config(settings, tokenizer.vocab_size if tokenizer else None)
    mappings = hf.mappings(settings["model_type"], config)
    theirs = TheirWeights(source)
    theirs.check(mappings, config)
    holders = {name: mapping for mapping in mappings for name in mapping.ours}

    def read(name: str) -> Tensor:
        return holders[name].split(theirs(holders[name].theirs))[name].float()

    files = {"tokenizer.json": tokenizer.json.encode(), CONFIG_FILE: config_file(tokenizer.eos_text)} if tokenizer else {}
    with new_folder(dest) as temporary:
        entries = write_checkpoint(temporary, config, {"model": configuration.to_dict(config)}, read, files)
        agreement = compare(config, checkpoints.WeightReader(temporary), source)
        _require(agreement, source)
        commit_folder(temporary, dest, entries)
    return agreement


def import_olmo(source: Path, dest: Path, left_out: tuple[str, ...] = (), step: int | None = None) -> int:
    """Write an unsharded OLMo checkpoint (model.pt, config.yaml, and optim.pt if it is there) as one of ours; gives the
    step after which a run with resume_from goes on. When `source` is a YAML file, write `dest` as its translation.

    Raises ConfigError with their key that we do not have, CheckpointError on files and weights that do not fit.
    """
    settings = olmo.read_settings(configuration.decoded(configuration.read([_yaml_of(source)], resolve=False)), left_out)
    if source.is_file():
        replace_file(dest, configuration.dump(settings).encode())
        return 0
    config = configuration.build(ModelConfig, settings["model"], "model")
    weights = _load_pt(source / "model.pt")
    shapes = {name: parameter.shape for name, parameter in _on_meta(config).named_parameters()}
    holders = olmo.mappings(weights, shapes)
    if missing := sorted(shapes.keys() - holders.keys()):
        raise CheckpointError(source / "model.pt", f"{missing[0]} is absent, expected {tuple(shapes[missing[0]])}")
    for mapping in holders.values():
        if (found := weights[mapping.theirs].shape) != mapping.shape:
            raise CheckpointError(source / "model.pt", f"{mapping.theirs} is {tuple(found)}, expected {tuple(mapping.shape)}")
    moments = _moments(source / "optim.pt") if (source / "optim.pt").is_file() else None
    updates = None if moments is None else int(next(iter(moments.values()))["step"])
    moment_holders = olmo.mappings(moments or (), shapes)
    if step is None:
        named = re.match(r"step(\d+)", source.resolve().name)
        step = int(named[1]) if named else updates or 0

    def read(name: str) -> Tensor:
        return holders[name].split(weights[holders[name].theirs])[name].float()

    def read_moment(name: str, key: str) -> Tensor:
        mapping = moment_holders[name]
        return mapping.split(moments[mapping.theirs][key])[name].float()

    with new_folder(dest) as temporary:
        entries = write_checkpoint(temporary, config, settings, read, {}, step, updates, read_moment)
        commit_folder(temporary, dest, entries)
    return step


def _yaml_of(source: Path) -> Path:
    if source.is_dir() and not (source / "model.pt").is_file():
        raise CheckpointError(source, "holds no model.pt; name an unsharded checkpoint of OLMo, or its YAML file")
    return source / "config.yaml" if source.is_dir() else source


def _load_pt(file: Path) -> dict[str, Any]:
    """The one exception to `no file is unpickled`: OLMo's own format. weights_only admits tensors and plain containers
    and refuses everything that would run code; mmap reads a tensor when it is used."""
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as problem:  # what torch raises depends on what is wrong inside
        raise CheckpointError(file, f"cannot be opened: {str(problem).splitlines()[0]}") from problem


def _moments(file: Path) -> dict[str, dict[str, Tensor]]:
    """{their name: AdamW's state} of an optim.pt, whether it is keyed by names (FSDP) or by numbers (DDP)."""
    stored = _load_pt(file)
    numbered = {n: name for g in stored["param_groups"] for n, name in zip(g["params"], g["param_names"], strict=True)}
    return {numbered.get(key, key): value for key, value in stored["state"].items()}


def transformers() -> Any:
    """The package, imported. Raises ConfigError when it is not installed."""
    try:
        import transformers
    except ImportError as problem:
        what = f"compares logits with transformers, which cannot be imported ({problem}); pip install 'olmo-train[convert]'"
        raise ConfigError("convert", what) from problem
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _require(agreement: Agreement, source: Path) -> None:
    if not agreement.holds:
        raise CheckpointError(source, f"was not converted: {agreement}, more than {MAX_DIFFERENCE:g} and {MAX_RELATIVE:g}")


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
    """Write the files of a checkpoint; gives their manifest entries.

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
    """Write tensors of these sizes in bytes into files of about SHARD_BYTES; gives the manifest entry of each file, and
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


# ---- their side


def _write_their_weights(folder: Path, family: str, config: ModelConfig, read: Read, dtype: torch.dtype) -> None:
    mappings = {mapping.theirs: mapping for mapping in hf.mappings(family, config)}
    sizes = {name: mapping.shape.numel() * dtype.itemsize for name, mapping in mappings.items()}
    entries, where = _write_shards(folder, sizes, lambda name: mappings[name].join([read(part) for part in mappings[name].ours]))
    if len(entries) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())


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
            raise CheckpointError(folder, "holds no model.safetensors; save it anew with safe_serialization=True")

    def __call__(self, name: str) -> Tensor:
        with safetensors.safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def check(self, mappings: list[hf.Mapping], config: ModelConfig) -> None:
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


def _text_files(
    family: str, config: ModelConfig, tokenizer: Tokenizer | None, eos_id: int | None, dtype: torch.dtype
) -> dict[str, bytes]:
    """The JSON files of a transformers folder."""
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError("--tokenizer", f"{tokenizer.name} has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    pad_id = tokenizer.inner.token_to_id(PAD_TEXT) if tokenizer else None
    pad_id = eos_id if pad_id is None else pad_id
    settings = hf.to_settings(family, config, eos_id, pad_id, str(dtype).removeprefix("torch."))
    generation = {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id}
    n_tokens = tokenizer.vocab_size if tokenizer else config.vocab_size
    if config.vocab_rows > n_tokens:  # ids without a token, and rows of padding
        generation["suppress_tokens"] = list(range(n_tokens, config.vocab_rows))
    files = {"config.json": settings, "generation_config.json": generation}
    texts = {name: json.dumps(values, indent=1).encode() for name, values in files.items()}
    if tokenizer is None:
        return texts
    about = config_file(
        tokenizer.eos_text,
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token=tokenizer.inner.id_to_token(pad_id),
        padding_side="left",  # text is continued at its right end
        model_max_length=config.seq_len,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    return texts | {"tokenizer.json": tokenizer.json.encode(), CONFIG_FILE: about}


def _their_tokenizer(folder: Path) -> Tokenizer | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return load_tokenizer(file)
    except DataError as problem:
        log.warning("%s; the checkpoint gets no tokenizer", problem)
        return None


# ---- proof


def compare(config: ModelConfig, read: Read, folder: Path) -> Agreement:
    """Our logits of our weights beside transformers' of its folder: on the same tokens, in fp32, in evaluation mode."""
    tokens = torch.randint(config.vocab_size, (2, min(64, config.seq_len)), generator=torch.Generator().manual_seed(1))
    ours = _our_logits(config, read, tokens)
    theirs = _their_logits(folder, tokens)
    difference = (ours - theirs).abs()
    return Agreement(
        difference.max().item(), (difference.norm() / theirs.norm()).item(), theirs.abs().max().item(), config.n_layers
    )


def _our_logits(config: ModelConfig, read: Read, tokens: Tensor) -> Tensor:
    model = _on_meta(config).eval()
    with torch.no_grad(), _weights_when_needed(model, model.blocks, read):
        return model(tokens)


def _their_logits(folder: Path, tokens: Tensor) -> Tensor:
    library = transformers()
    settings = library.AutoConfig.from_pretrained(folder)
    check_choice("model_type", settings.model_type, hf.FAMILIES)
    with _parameters_on_meta():
        model = getattr(library, hf.FAMILIES[settings.model_type].architecture)(settings).eval()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == settings.num_hidden_layers)
    weights = TheirWeights(folder)
    with torch.no_grad(), _weights_when_needed(model, layers, lambda name: weights(name).float()):
        return model(tokens, use_cache=False).logits.float()


def _on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device, and their buffers, which are computed, are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _weights_when_needed(model: nn.Module, blocks: nn.ModuleList, read: Read) -> Iterator[None]:
    """A model on the meta device that can run: each block has its weights while it computes, the rest have them always."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one has one name
    in_blocks = {id(module) for block in blocks for module in block.modules()}
    meta = {module: dict(module._parameters) for module in model.modules()}
    values: dict[str, nn.Parameter] = {}

    def fill(modules: Iterator[nn.Module]) -> None:
        for module in modules:
            for key, parameter in meta[module].items():
                if parameter is not None:
                    name = names[id(parameter)]
                    if name not in values:
                        values[name] = nn.Parameter(read(name), requires_grad=False)
                    module._parameters[key] = values[name]
        values.clear()

    def empty(block: nn.Module) -> None:
        for module in block.modules():
            module._parameters.update(meta[module])

    fill(module for module in model.modules() if id(module) not in in_blocks)
    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda block, args: fill(block.modules())))
        hooks.append(block.register_forward_hook(lambda block, args, output: empty(block)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

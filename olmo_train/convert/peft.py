"""Runs with adapters: merged into plain checkpoints, and to and from folders of PEFT (github.com/huggingface/peft).

PEFT saves `adapter_config.json` and `adapter_model.safetensors`, whose tensors it names `base_model.model.MODULE.lora_A.weight`,
where MODULE is the Linear in transformers' model. Its A, B and magnitudes are ours, so a conversion changes names only. As in
convert/hf.py, a folder gets its final name only after the logits of what was written match those of the source. PEFT itself is
not needed: its folder is merged into transformers' model as LoraConfig describes it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from olmo_train import config as configuration
from olmo_train.checkpoint import folders, load
from olmo_train.convert import families
from olmo_train.convert.check import WITH_ADAPTERS, Agreement, compare, our_logits, require, their_logits
from olmo_train.convert.folders import new_folder, on_meta, transformers, write_checkpoint
from olmo_train.convert.hf import their_config, their_tokenizer, tokenizer_files
from olmo_train.data.templates import recorded_template, template_for
from olmo_train.data.tokenizer import CONFIG_FILE, load_tokenizer
from olmo_train.errors import CheckpointError, ConfigError, reason
from olmo_train.model.adapter import merged, own_parameters
from olmo_train.model.config import AdapterConfig, ModelConfig, Target
from olmo_train.storage import commit_folder, write_file

log = logging.getLogger(__name__)
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}  # ours: PEFT's
OF_THE_RUN = ("run_dir", "init_from", "resume_from", "adapter")  # keys that a merged checkpoint does not have
# Keys of LoraConfig: those that an import reads, with the values that it can express, and those that do not change what is
# computed. Any other key that is set is refused.
ONLY = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change the base's weights
}
IGNORED = """
    r lora_alpha use_dora use_rslora lora_dropout target_modules exclude_modules layers_to_transform layers_pattern
    base_model_name_or_path revision auto_mapping peft_version inference_mode megatron_core qalora_group_size runtime_config
    eva_config ensure_weight_tying
"""
MERGE_THERE = "merge it with PEFT (merge_and_unload, then save_pretrained) and convert the result with import-hf"


class Adapted(NamedTuple):
    """A checkpoint of a run with adapters."""

    folder: Path
    saved: dict[str, Any]  # its config.yaml, as config.read returns it
    config: ModelConfig
    stored: load.WeightReader


def open_adapted(source: Path, verb: str, moved_base: Path | None = None) -> Adapted:
    """The checkpoint at `source`, a folder or a run_dir. Raises ConfigError when it has no adapters, and when its base is neither
    where it was nor at `moved_base`."""
    folder = folders.resolve(source)
    if "base" not in folders.read_state(folder):
        what = "has no adapters: its checkpoint holds all weights already"
        raise ConfigError(source, f"{what}; {verb} takes a run with adapter.kind lora or dora")
    saved = configuration.read([folder / "config.yaml"])
    config = configuration.build(ModelConfig, saved["model"], "model")
    return Adapted(folder, saved, config, load.WeightReader(folder, moved_base))


# ---- the conversions


def merge(source: Path, dest: Path, moved_base: Path | None = None) -> Agreement:
    """Write the weights of a run with adapters, merged in fp32, as a checkpoint without adapters. It keeps the configuration, the
    step and the tokenizer of the run.

    Raises ConfigError for a run without adapters, and CheckpointError when the logits of adapted and merged model differ.
    """
    folder, saved, config, stored = open_adapted(source, "convert merge", moved_base)
    kept = configuration.decoded({key: value for key, value in saved.items() if key not in OF_THE_RUN})
    started_in = getattr(saved["adapter"]["kind"], "base", None)  # where relative paths of the data start
    files = {"config.yaml": configuration.dump(kept, started_in).encode(), **_tokenizer_of(folder)}
    with new_folder(dest) as temporary:
        step = folders.read_state(folder)["step"]
        entries = write_checkpoint(temporary, config, kept, stored, files, step)
        written = our_logits(config, load.WeightReader(temporary))
        adapted = our_logits(config, stored.unmerged, stored.adapter)
        agreement = require(compare(written, adapted, config, WITH_ADAPTERS), source)
        commit_folder(temporary, dest, entries)
    return agreement


def export_peft(source: Path, dest: Path, base_name: str | None = None, moved_base: Path | None = None) -> Agreement:
    """Write the adapters of a run as a folder that PeftModel.from_pretrained loads beside the exported base.
    `moved_base`: where the base is now, if it has moved.

    Raises ConfigError for a run without adapters or with some that PEFT cannot express, and CheckpointError when the logits of
    the run and of the folder differ.
    """
    folder, _, config, stored = open_adapted(source, "convert export-peft", moved_base)
    adapter, family = stored.adapter, families.family_of(config)
    names = peft_names(family, config, adapter)
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    own = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "use_rslora": adapter.rank_stabilized,
        "use_dora": adapter.kind == "dora",
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(dest) as temporary:
        tensors = {theirs: stored.unmerged(ours).contiguous() for theirs, ours in names.items()}
        write_file(temporary / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        write_file(temporary / SETTINGS, json.dumps(settings, indent=1).encode())
        files = tokenizer_files(own, config, template_for(folder, own)) if own else {}
        for name, content in files.items():
            write_file(temporary / name, content)
        agreement = _check_peft(config, stored, temporary, source)
        commit_folder(temporary, dest)
    return agreement


def import_peft(source: Path, dest: Path, base: Path, dtype: str = "fp32") -> Agreement:
    """Write a folder of PEFT as a checkpoint of a run with adapters. Its frozen weights are those of the checkpoint `base` in the
    precision `dtype`.

    Raises ConfigError with PEFT's key that cannot be expressed, and CheckpointError when the tensors are not as they should be or
    the logits do not agree.
    """
    transformers()
    base = folders.resolve(base)
    if "base" in folders.read_state(base):
        raise ConfigError("--base", folders.merge_first(base))
    config = configuration.build(ModelConfig, configuration.read([base / "config.yaml"])["model"], "model")
    family, about, tensors = families.family_of(config), read_settings(source), read_tensors(source)
    adapter = _adapter_of(about, targets_of(source, family, config, tensors))
    names = peft_names(family, config, adapter)
    shapes = {name: parameter.shape for name, parameter in own_parameters(on_meta(config, adapter)).items()}
    expected = {theirs: shapes[ours] for theirs, ours in names.items()}
    load.check_shapes(source / WEIGHTS, {name: tensor.shape for name, tensor in tensors.items()}, expected)
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(source / WEIGHTS, f"{broken[0]} and {len(broken) - 1} other tensors hold non-finite values")
    if about.get("lora_dropout"):
        log.warning("%s: lora_dropout %s is left out: adapters here have no dropout", source / SETTINGS, about["lora_dropout"])
    theirs_of = {ours: theirs for theirs, ours in names.items()}
    values = {"model": configuration.to_dict(config), "adapter": configuration.to_dict(adapter)}
    files = _tokenizer_of(base, source)
    record = folders.base_record(base, dtype)
    with new_folder(dest) as temporary:
        entries = write_checkpoint(
            temporary, config, values, lambda name: tensors[theirs_of[name]], files, adapter=adapter, base=record
        )
        agreement = _check_peft(config, load.WeightReader(temporary), source, source)
        commit_folder(temporary, dest, entries)
    return agreement


# ---- PEFT's folder


def how_to_load(source: Path) -> str:
    """A line that says which base the exported adapters of a run need."""
    base = folders.read_state(folders.resolve(source))["base"]
    dtype = " --dtype bf16" if base["dtype"] == "bf16" else ""
    return f"trained beside {base['path']} in {base['dtype']}; transformers loads that after: convert export-hf BASE DEST{dtype}"


def peft_names(family: str, config: ModelConfig, adapter: AdapterConfig) -> dict[str, str]:
    """{PEFT's name: ours} of the tensors of all adapters. Raises ConfigError for targets that the family stores as one matrix."""
    if config.parametrization != "standard":
        what = f"{config.parametrization} has multipliers, which an exported base has in its weights and adapters beside it lack"
        raise ConfigError("model.parametrization", f"{what}; convert the merged model with export-hf")
    holders = {name: mapping for mapping in families.mappings(family, config) for name in mapping.ours}
    names = {}
    for name in own_parameters(on_meta(config, adapter)):
        linear, _, key = name.partition(".adapter.")
        mapping = holders[f"{linear}.weight"]
        if len(mapping.ours) > 1:
            parts = [part.split(".")[-2] for part in mapping.ours]
            module = mapping.theirs.split(".")[-2]
            what = f"{family} stores {', '.join(parts)} as one matrix, {module}, which has one A in PEFT and one for each here"
            fix = f"leave {', '.join(parts)} out of the targets, or convert the merged model with export-hf"
            raise ConfigError("adapter.targets", f"{what}; {fix}")
        names[f"{PREFIX}{mapping.theirs.removesuffix('weight')}{SUFFIXES[key]}"] = name
    return names


def targets_of(source: Path, family: str, config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Our names of the matrices of a block that the tensors of a folder adapt. Raises CheckpointError when there are none."""
    ours = {mapping.theirs.removesuffix(".weight"): mapping.ours for mapping in families.mappings(family, config)}
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors}
    found = {name.split(".")[-2] for module in modules for name in ours.get(module, ())}
    if targets := tuple(target for target in get_args(Target) if target in found):
        return targets
    what = f"adapts no matrix of a {family} model; its first tensor is {min(tensors, default='absent')}"
    raise CheckpointError(source / WEIGHTS, f"{what}; name with --base the checkpoint that it was trained beside")


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of adapter_config.json. Raises ConfigError with a key that cannot be expressed, and CheckpointError."""
    file = folder / SETTINGS
    if not file.is_file():
        raise CheckpointError(folder, f"holds no {SETTINGS}; name a folder that PEFT's save_pretrained wrote")
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise CheckpointError(file, f"cannot be read: {reason(problem)}") from problem
    if not isinstance(about, dict):
        raise CheckpointError(file, "holds no settings of PEFT; name a folder that its save_pretrained wrote")
    for key, value in about.items():
        if value not in ONLY[key] if key in ONLY else value and key not in IGNORED.split():
            raise ConfigError(key, f"{value!r} of {file} cannot be expressed; {MERGE_THERE}")
    return about


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """{PEFT's name: tensor} of adapter_model.safetensors, in fp32. Pickled weights are never opened. Raises CheckpointError."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(folder, f"holds no {WEIGHTS}; save it again with safe_serialization=True")
    try:
        return {name: tensor.float() for name, tensor in safetensors.torch.load_file(file).items()}
    except (OSError, safetensors.SafetensorError) as problem:
        raise CheckpointError(file, f"cannot be read: {reason(problem)}") from problem


def _adapter_of(about: dict[str, Any], targets: tuple[str, ...]) -> AdapterConfig:
    """Our adapters of a checked adapter_config.json; r and lora_alpha have PEFT's defaults."""
    values = {"kind": "dora" if about.get("use_dora") else "lora", "rank": about.get("r", 8), "targets": targets}
    values |= {"alpha": about.get("lora_alpha", 8), "rank_stabilized": bool(about.get("use_rslora"))}
    return configuration.build(AdapterConfig, values, "adapter")


@torch.no_grad()
def _check_peft(config: ModelConfig, stored: load.WeightReader, folder: Path, source: Path) -> Agreement:
    """Compare our adapted model with transformers' model, into whose weights the tensors of a PEFT folder are merged by PEFT's
    names and settings. Raises CheckpointError about `source` when their logits do not agree."""
    family = families.family_of(config)
    mappings = {mapping.theirs: mapping for mapping in families.mappings(family, config)}
    tensors, scale = read_tensors(folder), _adapter_of(read_settings(folder), stored.adapter.targets).scale

    def read(name: str) -> Tensor:
        weight = mappings[name].join([stored.unmerged(part) for part in mappings[name].ours])
        prefix = f"{PREFIX}{name.removesuffix('weight')}"
        adapter = {key: tensors[prefix + suffix] for key, suffix in SUFFIXES.items() if prefix + suffix in tensors}
        return merged(weight, adapter, scale) if adapter else weight

    settings = transformers().AutoConfig.for_model(**families.to_settings(family, config, None, None, "float32"))
    ours = our_logits(config, stored.unmerged, stored.adapter)
    return require(compare(ours, their_logits(config, settings, read), config, WITH_ADAPTERS), source)


def _tokenizer_of(checkpoint: Path, theirs: Path | None = None) -> dict[str, bytes]:
    """{name: contents} of the tokenizer of a checkpoint, which ends texts as that in the folder `theirs` does, if there is one: a
    finetuned model ends its turns with another token than its base, and answers in another template."""
    files = {name: checkpoint / name for name in ("tokenizer.json", CONFIG_FILE)}
    found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    other = their_tokenizer(theirs) if theirs and (theirs / CONFIG_FILE).is_file() else None
    if theirs is None or other is None:
        return found
    if "tokenizer.json" not in found:
        return {"tokenizer.json": other.json.encode(), CONFIG_FILE: their_config(theirs, other)}
    own = load_tokenizer(checkpoint)
    is_known = own.inner.token_to_id(other.eos_text) is not None
    differs = other.eos_text != own.eos_text or recorded_template(theirs) is not None
    return found | ({CONFIG_FILE: their_config(theirs, other)} if is_known and differs else {})

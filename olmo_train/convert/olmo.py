"""OLMo's own checkpoints and configuration files, read into ours.

Every key of an OLMo configuration must be in one of these tables, or it is refused by name. So the converted model trains as
the original would, and nothing is silently left out.

Sources: allenai/OLMo 0.6.0, olmo/config.py (keys and their defaults), olmo/model.py (names of weights).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from olmo_train import config as configuration
from olmo_train.checkpoint.load import check_shapes
from olmo_train.convert.families import known_values, pair, reader
from olmo_train.convert.folders import new_folder, write_checkpoint
from olmo_train.errors import CheckpointError, ConfigError, did_you_mean, near_files, nearest
from olmo_train.model.config import ModelConfig
from olmo_train.storage import commit_folder, replace_file

T = TypeVar("T")

# ---- names of weights

NAMES = {  # as in families.pair
    "embed.weight": "transformer.wte.weight",
    "blocks.{i}.attn_norm.weight": "transformer.blocks.{i}.attn_norm.weight",
    "blocks.{i}.attn_norm.bias": "transformer.blocks.{i}.attn_norm.bias",
    "blocks.{i}.attn.wq.weight": "transformer.blocks.{i}.att_proj.weight",
    "blocks.{i}.attn.wk.weight": "transformer.blocks.{i}.att_proj.weight",
    "blocks.{i}.attn.wv.weight": "transformer.blocks.{i}.att_proj.weight",
    "blocks.{i}.attn.q_norm.weight": "transformer.blocks.{i}.q_norm.weight",
    "blocks.{i}.attn.k_norm.weight": "transformer.blocks.{i}.k_norm.weight",
    "blocks.{i}.attn.wo.weight": "transformer.blocks.{i}.attn_out.weight",
    "blocks.{i}.mlp_norm.weight": "transformer.blocks.{i}.ff_norm.weight",
    "blocks.{i}.mlp_norm.bias": "transformer.blocks.{i}.ff_norm.bias",
    "blocks.{i}.mlp.w_up.weight": "transformer.blocks.{i}.ff_proj.weight",
    "blocks.{i}.mlp.w_gate.weight": "transformer.blocks.{i}.ff_proj.weight",
    "blocks.{i}.mlp.w_down.weight": "transformer.blocks.{i}.ff_out.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "transformer.ff_out.weight",
}
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.|^.*?(?=transformer\.)")
IN_GROUP = re.compile(r"\.block_groups\.(\d+)\.(\d+)\.")


def plain_names(stored: dict[str, T]) -> dict[str, T]:
    """A state dict without the names of what wrapped the model when it was saved, and with the blocks of all groups numbered
    as one list."""
    plain = {WRAPPERS.sub("", name): value for name, value in stored.items()}
    size = 1 + max((int(match[2]) for name in plain for match in IN_GROUP.finditer(name)), default=0)
    return {
        IN_GROUP.sub(lambda match: f".blocks.{int(match[1]) * size + int(match[2])}.", name): value
        for name, value in plain.items()
    }


# ---- configuration: keys of theirs, those of a section as section.key

SECTIONS = ("model", "optimizer", "scheduler", "data")
IGNORED = """
    run_name dry_run evaluators eval_interval tokenizer save_folder remote_save_folder canceled_check_interval
    save_interval_unsharded save_interval_ephemeral save_num_checkpoints_to_keep save_num_unsharded_checkpoints_to_keep
    save_overwrite force_save_unsharded no_pre_train_checkpoint load_path load_path_sharded_checkpointer restore_dataloader
    try_load_latest_save sharded_checkpointer new_style_checkpoints device_train_batch_size device_eval_batch_size
    eval_subset_num_batches eval_on_load device_train_grad_accum wandb speed_monitor console_log_interval gen1_gc_interval
    ddp time_limit extra_steps_after_cancel early_stopping_factor save_data_indices python_profiling torch_profiling stop_at
    stop_after fused_loss hf_datasets_cache_dir module_outputs_save_steps
    model.block_group_size model.alibi_bias_max model.flash_attention model.init_device model.precision model.pad_token_id
    optimizer.metrics_log_interval optimizer.record_update_metrics
    data.pad_direction data.num_workers data.pin_memory data.prefetch_factor data.persistent_workers data.timeout
"""  # do not change what is trained
ONLY = {  # options that we do not have: {key: the values that mean the option is off}
    key: values
    for values, keys in (
        ((False,), "reset_optimizer_state reset_trainer_state model.alibi model.embedding_layer_norm model.include_bias"),
        ((False,), "model.scale_logits model.scale_emb_init optimizer.selective_updates data.generate_attention_mask"),
        ((True,), "model.rope model.rope_full_precision data.drop_last"),
        ((None,), "max_grad_norm_ratio model.emb_init_std optimizer.no_decay_norm_and_bias"),
        ((None,), "data.label_mask_paths data.instance_filter"),
        ((None, 0), "epoch fast_forward_batches"),
        ((0.0,), "model.attention_dropout model.residual_dropout model.embedding_dropout"),
        (("sequential",), "model.block_type"),
        (("adamw",), "optimizer.name"),
    )
    for key in keys.split()
}
RENAMED = {  # theirs: ours, and OLMo's default, which a file that leaves the key out means
    "seed": ("seed", 6198),
    "global_train_batch_size": ("global_batch_size", 512),
    "device_train_microbatch_size": ("micro_batch_size", 16),
    "model.d_model": ("model.d_model", 768),
    "model.n_layers": ("model.n_layers", 12),
    "model.n_heads": ("model.n_heads", 12),
    "model.vocab_size": ("model.vocab_size", 50257),
    "model.max_sequence_length": ("model.seq_len", 1024),
    "model.layer_norm_eps": ("model.norm_eps", 1e-5),
    "model.attention_layer_norm": ("model.qk_norm", False),
    "model.rope_theta": ("model.rope_theta", 10_000),
    "model.weight_tying": ("model.tie_embeddings", True),
    "model.clip_qkv": ("model.clip_qkv", None),
    "model.init_fn": ("model.init", "normal"),
    "model.init_std": ("model.init_std", 0.02),
    "model.eos_token_id": ("data.eos_id", 50256),
    "optimizer.learning_rate": ("optim.peak_lr", 1e-4),
    "optimizer.betas": ("optim.betas", [0.9, 0.95]),
    "optimizer.eps": ("optim.eps", 1e-5),
    "optimizer.weight_decay": ("optim.weight_decay", 0.01),
    "optimizer.decay_embeddings": ("optim.decay_embeddings", False),
    "optimizer.decay_norm_and_bias": ("optim.decay_norms", False),
    "data.seed": ("data.seed", None),
    "data.generate_doc_lengths": ("data.document_mask", False),
}
DEFAULTS = {theirs: default for theirs, (_, default) in RENAMED.items()} | {
    "max_duration": 10000, "max_grad_norm": None, "precision": None, "compile": None, "activation_checkpointing": None,
    "save_interval": 1000, "softmax_auxiliary_loss": False, "auxiliary_loss_multiplier": 1e-4, "fsdp": {},
    "distributed_strategy": "fsdp",
    "model.n_kv_heads": None, "model.multi_query_attention": None, "model.mlp_ratio": 4, "model.mlp_hidden_size": None,
    "model.activation_type": "swiglu", "model.embedding_size": 50304, "model.init_cutoff_factor": None,
    "model.layer_norm_type": "default", "model.layer_norm_with_affine": True, "model.bias_for_layer_norm": None,
    "model.attention_layer_norm_with_affine": True, "model.norm_after": False, "model.rope": False,
    "model.include_bias": True, "model.attention_dropout": 0.1, "model.residual_dropout": 0.1, "model.embedding_dropout": 0.1,
    "optimizer.name": "lionw",
    "scheduler.name": "cosine_with_warmup", "scheduler.units": "steps", "scheduler.t_warmup": 100, "scheduler.t_max": None,
    "scheduler.alpha_f": 0.1, "scheduler.grad_clip_warmup_steps": None, "scheduler.grad_clip_warmup_factor": None,
    "scheduler.warmup_min_lr": None,
    "data.paths": None, "data.datasets": None, "data.memmap_dtype": "uint16", "data.drop_last": False,
}  # fmt: skip
SCHEDULES = {
    "cosine_with_warmup": "cosine",
    "linear_with_warmup": "linear",
    "inverse_sqrt_with_warmup": "inverse_sqrt",
    "constant_with_warmup": "constant",
    "constant": "constant",
}
ACTIVATIONS = {"swiglu": "swiglu", "gelu": "gelu"}
PRECISIONS = {"amp_bf16": "bf16", "fp32": "fp32", None: "fp32"}
REDUCE_DTYPES = {"mixed": "fp32", "pure": "bf16", None: "fp32"}


def read_settings(values: dict[str, Any], left_out: Iterable[str] = ()) -> dict[str, Any]:
    """Our configuration, as nested values, of the contents of an OLMo file; run_dir is left to the user.

    Keys in `left_out` (dotted) are skipped. Raises ConfigError with their key on every option that we do not have.
    """
    theirs = _checked(_interpolated(values, values), left_out)
    ours = {name: theirs[key] for key, (name, _) in RENAMED.items()} | _model(theirs) | _data(theirs)
    ours |= _schedule(theirs, tokens_per_step=ours["global_batch_size"] * ours["model.seq_len"])
    ours |= {
        "loss_divisor": "all_tokens",
        "optim.name": "adamw",
        "optim.max_grad_norm": math.inf if theirs["max_grad_norm"] is None else theirs["max_grad_norm"],
        "parallel.precision": _choice("precision", theirs, PRECISIONS),
        "parallel.reduce_dtype": _reduce_dtype(theirs),
        "parallel.activation_checkpointing": "full" if theirs["activation_checkpointing"] else "none",
        "parallel.compile": theirs["compile"] is not None or None,  # not compiled there: our default
        "checkpoint.interval_steps": theirs["save_interval"] or 1000,
    }
    nested: dict[str, Any] = {}
    for key, value in ours.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _interpolated(value: Any, root: dict[str, Any]) -> Any:
    """The value with each text `${a.b}` replaced by the value of that key. Other interpolations, of paths and of the
    environment, stay as they are."""
    if isinstance(value, dict):
        return {key: _interpolated(inner, root) for key, inner in value.items()}
    match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    found: Any = root
    for key in match[1].split(".") if match else ():
        found = found.get(key) if isinstance(found, dict) else None
    return value if match is None or found is None else found


def _checked(values: dict[str, Any], left_out: Iterable[str]) -> dict[str, Any]:
    """Their values by dotted key, with OLMo's defaults. Raises ConfigError on a key or a value that we do not have."""
    given = {key: value for key, value in values.items() if key not in SECTIONS}
    given |= {f"{name}.{key}": value for name in SECTIONS for key, value in (values.get(name) or {}).items()}
    given = {key: value for key, value in given.items() if key not in left_out}
    complete = given | {key: default for key, default in DEFAULTS.items() if key not in given}
    known = [*DEFAULTS, *ONLY, *IGNORED.split()]
    for key, value in complete.items():
        if key not in known:
            raise ConfigError(key, f"is no key of OLMo that we know; {nearest(key, known)}")
        if key in ONLY and value not in ONLY[key] and key not in left_out:
            only = f"only {known_values(ONLY[key])} can"
            raise ConfigError(key, f"{value!r} cannot be expressed, {only}; --leave-out {key} trains without it")
    return complete


def _choice(key: str, theirs: dict[str, Any], known: dict[Any, Any]) -> Any:
    """Our value for their value of a key."""
    if theirs[key] not in known:
        raise ConfigError(key, f"{theirs[key]!r} cannot be expressed; {nearest(str(theirs[key]), map(str, known))}")
    return known[theirs[key]]


def _reduce_dtype(theirs: dict[str, Any]) -> str:
    if theirs["precision"] != "amp_bf16" or theirs["distributed_strategy"] != "fsdp" or theirs["fsdp"] is None:
        return "fp32"
    return _choice("fsdp.precision", {"fsdp.precision": theirs["fsdp"].get("precision", "pure")}, REDUCE_DTYPES)


def _model(theirs: dict[str, Any]) -> dict[str, Any]:
    hidden = theirs["model.mlp_hidden_size"] or theirs["model.mlp_ratio"] * theirs["model.d_model"]
    activation = _choice("model.activation_type", theirs, ACTIVATIONS)
    kv_heads = theirs["model.n_kv_heads"] or (1 if theirs["model.multi_query_attention"] else None)
    init, cutoff = theirs["model.init_fn"], theirs["model.init_cutoff_factor"]
    _choice("model.init_fn", theirs, {"mitchell": "", "normal": ""})
    if (cutoff or (3 if init == "mitchell" else None)) != 3:
        raise ConfigError("model.init_cutoff_factor", f"{cutoff!r} cannot be expressed; initial values are cut at 3 deviations")
    return {
        "model.n_kv_heads": None if kv_heads == theirs["model.n_heads"] else kv_heads,
        "model.mlp_hidden": hidden // 2 if activation == "swiglu" else hidden,  # theirs counts both halves
        "model.padded_vocab_size": theirs["model.embedding_size"] or theirs["model.vocab_size"],
        "model.activation": activation,
        "model.block": "reordered_norm" if theirs["model.norm_after"] else "sequential",
        "model.z_loss": theirs["auxiliary_loss_multiplier"] if theirs["softmax_auxiliary_loss"] else 0.0,
        **_norms(theirs),
    }


def _norms(theirs: dict[str, Any]) -> dict[str, Any]:
    affine, kind = theirs["model.layer_norm_with_affine"], theirs["model.layer_norm_type"]
    bias = theirs["model.include_bias"] if theirs["model.bias_for_layer_norm"] is None else theirs["model.bias_for_layer_norm"]
    if theirs["model.attention_layer_norm"] and theirs["model.attention_layer_norm_with_affine"] != affine:
        raise ConfigError(
            "model.attention_layer_norm_with_affine", f"must be {affine}, as layer_norm_with_affine: we have one norm"
        )
    known = {("default", False): "layer_norm_nonparametric", ("default", True): "layer_norm", ("rms", True): "rms_norm"}
    norm = _choice("model.layer_norm_type", {"model.layer_norm_type": (kind, affine)}, known)
    if bias and norm == "rms_norm":
        raise ConfigError("model.bias_for_layer_norm", "true cannot be expressed beside layer_norm_type: rms")
    return {"model.norm": norm, "model.bias": "norm" if bias and affine else "none"}


def _schedule(theirs: dict[str, Any], tokens_per_step: int) -> dict[str, Any]:
    unit = _choice("scheduler.units", theirs, {"steps": 1, "tokens": tokens_per_step})
    name, end = _choice("scheduler.name", theirs, SCHEDULES), theirs["scheduler.t_max"]
    start, clip = theirs["scheduler.warmup_min_lr"], theirs["scheduler.grad_clip_warmup_steps"]
    has_clip = clip is not None and theirs["scheduler.grad_clip_warmup_factor"] is not None
    end = None if end is None else math.ceil(end / unit)
    steps = _steps(theirs["max_duration"], tokens_per_step, end)
    return {
        "total_steps": steps,
        "optim.schedule": name,
        "optim.warmup_steps": 0 if theirs["scheduler.name"] == "constant" else math.ceil(theirs["scheduler.t_warmup"] / unit),
        "optim.warmup_start_ratio": 0.1 if start is None else start / theirs["optimizer.learning_rate"],
        "optim.final_lr_ratio": 0.0 if name == "inverse_sqrt" else theirs["scheduler.alpha_f"],
        "optim.schedule_steps": None if end == steps else end,
        "optim.grad_clip_warmup_steps": math.floor(clip / unit) if has_clip else 0,
        "optim.grad_clip_warmup_factor": theirs["scheduler.grad_clip_warmup_factor"] if has_clip else 1.0,
    }


def _steps(duration: int | str, tokens_per_step: int, schedule_steps: int | None) -> int:
    """Updates of the run, given as a number, as `2e12T` tokens, or as `1ep` epochs, whose length only the data show."""
    text = str(duration)
    if text.endswith("T"):
        return math.ceil(int(float(text[:-1])) / tokens_per_step)
    if not text.endswith("ep"):
        return int(float(text))
    if schedule_steps is None:
        raise ConfigError("max_duration", f"{text} needs the length of the data; set it in steps or tokens, such as 2e12T")
    return schedule_steps  # the run may be stopped sooner


def _data(theirs: dict[str, Any]) -> dict[str, Any]:
    paths, datasets = theirs["data.paths"], theirs["data.datasets"] or {}
    if paths and datasets:
        raise ConfigError("data.paths", "is set beside data.datasets; OLMo reads one of them")
    by_name = {"olmo": paths} if paths else dict(sorted(datasets.items()))
    sources = {name: {"path": list(files), "dtype": theirs["data.memmap_dtype"]} for name, files in by_name.items()}
    return {"data.order": "olmo"} | ({"data.sources": sources} if sources else {})


# ---- checkpoints


def import_olmo(source: Path, dest: Path, left_out: tuple[str, ...] = (), step: int | None = None) -> int:
    """Write an unsharded OLMo checkpoint (model.pt, config.yaml, and optim.pt if it is there) as one of ours; returns the
    step after which a run with resume_from continues. When `source` is a YAML file, write `dest` as its translation.

    Raises ConfigError with their key that we do not have, CheckpointError on files and weights that do not fit.
    """
    settings = read_settings(configuration.decoded(configuration.read([_yaml_of(source)], resolve=False)), left_out)
    if source.is_file():
        replace_file(dest, configuration.dump(settings).encode())
        return 0
    config = configuration.build(ModelConfig, settings["model"], "model")
    weights, mappings = plain_names(_load_pt(source / "model.pt")), pair(NAMES, config)
    shapes = {name: weight.shape for name, weight in weights.items()}
    check_shapes(source / "model.pt", shapes, {mapping.theirs: mapping.shape for mapping in mappings})
    moments, updates = _moments(source / "optim.pt") if (source / "optim.pt").is_file() else ({}, None)
    if step is None:
        named = re.match(r"step(\d+)", source.resolve().name)
        step = int(named[1]) if named else updates or 0
    readers = {key: reader(mappings, values.__getitem__) for key, values in moments.items()}
    with new_folder(dest) as temporary:
        read = reader(mappings, weights.__getitem__)
        entries = write_checkpoint(temporary, config, settings, read, {}, step, updates, readers)
        commit_folder(temporary, dest, entries)
    return step


def _yaml_of(source: Path) -> Path:
    if not source.exists():
        fix = did_you_mean(near_files(source), "name an unsharded checkpoint of OLMo, or its YAML file")
        raise CheckpointError(source, f"does not exist; {fix}")
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


def _moments(file: Path) -> tuple[dict[str, dict[str, Tensor]], int]:
    """AdamW's state in an optim.pt, as {exp_avg, exp_avg_sq: {their name: tensor}} and the number of updates. It is keyed by
    names (FSDP) or by numbers (DDP)."""
    stored = _load_pt(file)
    numbered = {n: name for g in stored["param_groups"] for n, name in zip(g["params"], g["param_names"], strict=True)}
    states = plain_names({numbered.get(key, key): state for key, state in stored["state"].items()})
    moments = {key: {name: state[key] for name, state in states.items()} for key in ("exp_avg", "exp_avg_sq")}
    return moments, int(next(iter(states.values()))["step"])

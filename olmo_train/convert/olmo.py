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
from typing import Any

import torch
from torch import Tensor

from olmo_train import config as configuration
from olmo_train.convert import olmo
from olmo_train.convert.families import Mapping
from olmo_train.convert.folders import _on_meta, new_folder, write_checkpoint
from olmo_train.errors import CheckpointError, ConfigError, nearest
from olmo_train.model.config import ModelConfig
from olmo_train.storage import commit_folder, replace_file

# ---- names of weights

NAMES = {  # theirs -> ours; a tensor of theirs may hold several of ours, one below the other
    "transformer.wte.weight": "embed.weight",
    "transformer.blocks.{i}.attn_norm.weight": "blocks.{i}.attn_norm.weight",
    "transformer.blocks.{i}.attn_norm.bias": "blocks.{i}.attn_norm.bias",
    "transformer.blocks.{i}.att_proj.weight": "blocks.{i}.attn.wq.weight blocks.{i}.attn.wk.weight blocks.{i}.attn.wv.weight",
    "transformer.blocks.{i}.q_norm.weight": "blocks.{i}.attn.q_norm.weight",
    "transformer.blocks.{i}.k_norm.weight": "blocks.{i}.attn.k_norm.weight",
    "transformer.blocks.{i}.attn_out.weight": "blocks.{i}.attn.wo.weight",
    "transformer.blocks.{i}.ff_norm.weight": "blocks.{i}.mlp_norm.weight",
    "transformer.blocks.{i}.ff_norm.bias": "blocks.{i}.mlp_norm.bias",
    "transformer.blocks.{i}.ff_proj.weight": "blocks.{i}.mlp.w_up.weight blocks.{i}.mlp.w_gate.weight",
    "transformer.blocks.{i}.ff_out.weight": "blocks.{i}.mlp.w_down.weight",
    "transformer.ln_f.weight": "norm.weight",
    "transformer.ln_f.bias": "norm.bias",
    "transformer.ff_out.weight": "head.weight",
}
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.|^(module|model)\.")


def mappings(theirs: Iterable[str], shapes: dict[str, torch.Size]) -> dict[str, Mapping]:
    """{our name: the tensor of theirs that holds it} for the keys of a state dict, whatever wrapped the model when it was
    saved. `shapes` are those of our model; what it does not have is left out.

    Blocks in groups are counted through. Raises ConfigError on a key that belongs to no weight of ours.
    """
    plain = {_unwrapped(name): name for name in theirs}
    groups = [m for m in (re.search(r"\.block_groups\.(\d+)\.(\d+)\.", name) for name in plain) if m]
    size = 1 + max((int(m[2]) for m in groups), default=0)
    found = {}
    for name, original in plain.items():
        flat = re.sub(r"\.block_groups\.(\d+)\.(\d+)\.", lambda m: f".blocks.{int(m[1]) * size + int(m[2])}.", name)
        layer = re.search(r"\.(\d+)\.", flat)
        ours = NAMES.get(re.sub(r"\.\d+\.", ".{i}.", flat))
        if ours is None:
            raise ConfigError(original, "is no weight that we have; known: " + ", ".join(NAMES))
        names = [name for name in ours.replace("{i}", layer[1] if layer else "").split() if name in shapes]
        found |= dict.fromkeys(names, Mapping(original, tuple(names), tuple(shapes[name] for name in names)))
    return found


def _unwrapped(name: str) -> str:
    while WRAPPERS.search(name):
        name = WRAPPERS.sub("", name)
    return name


# ---- configuration: keys that change nothing here, keys that must have one value, and the rest, read below

NEUTRAL = {
    "": "run_name dry_run evaluators eval_interval tokenizer save_folder remote_save_folder canceled_check_interval "
    "save_interval_unsharded save_interval_ephemeral save_num_checkpoints_to_keep save_num_unsharded_checkpoints_to_keep "
    "save_overwrite force_save_unsharded no_pre_train_checkpoint load_path load_path_sharded_checkpointer restore_dataloader "
    "try_load_latest_save sharded_checkpointer new_style_checkpoints device_train_batch_size device_eval_batch_size "
    "eval_subset_num_batches eval_on_load device_train_grad_accum wandb speed_monitor console_log_interval gen1_gc_interval "
    "ddp time_limit extra_steps_after_cancel early_stopping_factor save_data_indices python_profiling "
    "torch_profiling stop_at stop_after fused_loss hf_datasets_cache_dir module_outputs_save_steps",
    "model": "block_group_size alibi_bias_max flash_attention init_device precision pad_token_id",
    "optimizer": "metrics_log_interval record_update_metrics",
    "scheduler": "",
    "data": "pad_direction num_workers pin_memory prefetch_factor persistent_workers timeout",
}
REQUIRED = {
    "": {
        "epoch": (None, 0),
        "fast_forward_batches": (None, 0),
        "reset_optimizer_state": (False,),
        "reset_trainer_state": (False,),
        "max_grad_norm_ratio": (None,),
    },
    "model": {
        "block_type": ("sequential",),
        "alibi": (False,),
        "rope": (True,),
        "rope_full_precision": (True,),
        "attention_dropout": (0.0,),
        "residual_dropout": (0.0,),
        "embedding_dropout": (0.0,),
        "embedding_layer_norm": (False,),
        "include_bias": (False,),
        "scale_logits": (False,),
        "scale_emb_init": (False,),
        "emb_init_std": (None,),
    },
    "optimizer": {"name": ("adamw",), "selective_updates": (False,), "no_decay_norm_and_bias": (None,)},
    "scheduler": {},
    "data": {
        "drop_last": (True,),
        "generate_attention_mask": (False,),
        "label_mask_paths": (None,),
        "instance_filter": (None,),
    },
}
# OLMo's defaults where they matter here: a file that leaves a key out means these.
DEFAULTS = {
    "": {
        "seed": 6198, "max_duration": 10000, "global_train_batch_size": 512, "device_train_microbatch_size": 16,
        "max_grad_norm": None, "precision": None, "compile": None, "activation_checkpointing": None, "save_interval": 1000,
        "softmax_auxiliary_loss": False, "auxiliary_loss_multiplier": 1e-4, "fsdp": {},
        "distributed_strategy": "fsdp",
    },
    "model": {
        "d_model": 768, "n_heads": 12, "n_kv_heads": None, "multi_query_attention": None, "clip_qkv": None, "n_layers": 12,
        "mlp_ratio": 4, "mlp_hidden_size": None, "activation_type": "swiglu", "rope_theta": 10_000, "rope": False,
        "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1, "include_bias": True,
        "attention_layer_norm": False, "layer_norm_type": "default", "layer_norm_with_affine": True, "layer_norm_eps": 1e-5,
        "attention_layer_norm_with_affine": True, "max_sequence_length": 1024, "bias_for_layer_norm": None,
        "vocab_size": 50257, "embedding_size": 50304, "weight_tying": True, "eos_token_id": 50256,
        "init_fn": "normal", "init_std": 0.02, "init_cutoff_factor": None, "norm_after": False,
    },
    "optimizer": {
        "name": "lionw", "learning_rate": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.95], "eps": 1e-5,
        "decay_norm_and_bias": False, "decay_embeddings": False,
    },
    "scheduler": {
        "name": "cosine_with_warmup", "units": "steps", "t_warmup": 100, "t_max": None, "alpha_f": 0.1,
        "grad_clip_warmup_steps": None, "grad_clip_warmup_factor": None, "warmup_min_lr": None,
    },
    "data": {
        "paths": None, "datasets": None, "memmap_dtype": "uint16", "generate_doc_lengths": False, "seed": None,
        "drop_last": False,
    },
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

    Keys in `left_out` (dotted) are passed over. Raises ConfigError with their key on every option that we do not have.
    """
    values = {key: value for key, value in _interpolated(values, values).items() if key not in left_out}
    sections = {name: dict(values.pop(name, None) or {}) for name in ("model", "optimizer", "scheduler", "data")}
    for name, section in {"": values, **sections}.items():
        for key in [key for key in section if _dotted(name, key) in left_out]:
            del section[key]
        sections[name] = _checked(name, section, left_out)
    run, model = sections[""], _model(sections["model"])
    tokens_per_step = int(run["global_train_batch_size"]) * model["seq_len"]
    model["z_loss"] = float(run["auxiliary_loss_multiplier"]) if run["softmax_auxiliary_loss"] else 0.0
    optim = _optimizer(sections["optimizer"], run["max_grad_norm"])
    optim |= _schedule(sections["scheduler"], optim["peak_lr"], tokens_per_step)
    steps = _steps(run["max_duration"], tokens_per_step, optim["schedule_steps"])
    if optim["schedule_steps"] == steps:
        optim["schedule_steps"] = None
    return {
        "seed": int(run["seed"]),
        "total_steps": steps,
        "global_batch_size": int(run["global_train_batch_size"]),
        "micro_batch_size": int(run["device_train_microbatch_size"]),
        "loss_divisor": "all_tokens",
        "model": model,
        "data": _data(sections["data"], sections["model"]["eos_token_id"]),
        "optim": optim,
        "parallel": {
            "precision": _choice("precision", run["precision"], PRECISIONS),
            "reduce_dtype": _reduce_dtype(run),
            "activation_checkpointing": "full" if run["activation_checkpointing"] else "none",
            "compile": run["compile"] is not None,
        },
        "checkpoint": {"interval_steps": int(run["save_interval"] or 1000)},
    }


def _interpolated(value: Any, root: dict[str, Any]) -> Any:
    """The value with each text `${a.b}` replaced by what stands there. Other interpolations, of paths and of the
    environment, stay as they are."""
    if isinstance(value, dict):
        return {key: _interpolated(inner, root) for key, inner in value.items()}
    match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    found: Any = root
    for key in match[1].split(".") if match else ():
        found = found.get(key) if isinstance(found, dict) else None
    return value if match is None or found is None else found


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _checked(section: str, given: dict[str, Any], left_out: Iterable[str]) -> dict[str, Any]:
    """The section with OLMo's defaults filled in, less the keys without meaning here. Raises ConfigError on any other."""
    complete = DEFAULTS[section] | given
    neutral, required = NEUTRAL[section].split(), REQUIRED[section]
    for key, value in complete.items():
        dotted = _dotted(section, key)
        if key not in DEFAULTS[section] and key not in neutral and key not in required:
            raise ConfigError(
                dotted, f"is no key of OLMo that we know; {nearest(key, [*DEFAULTS[section], *neutral, *required])}"
            )
        if key in required and value not in required[key] and dotted not in left_out:
            wanted = " or ".join("null" if known is None else str(known).lower() for known in required[key])
            raise ConfigError(dotted, f"{value!r} cannot be expressed, only {wanted} can; --leave-out {dotted} trains without it")
    return complete


def _choice(key: str, value: Any, known: dict[Any, str]) -> str:
    if value not in known:
        raise ConfigError(key, f"{value!r} cannot be expressed; {nearest(str(value), map(str, known))}")
    return known[value]


def _reduce_dtype(run: dict[str, Any]) -> str:
    if run["precision"] != "amp_bf16" or run["distributed_strategy"] != "fsdp" or run["fsdp"] is None:
        return "fp32"
    return _choice("fsdp.precision", run["fsdp"].get("precision", "pure"), REDUCE_DTYPES)


def _model(theirs: dict[str, Any]) -> dict[str, Any]:
    hidden = theirs["mlp_hidden_size"] or theirs["mlp_ratio"] * theirs["d_model"]
    activation = _choice("model.activation_type", theirs["activation_type"], ACTIVATIONS)
    heads, kv_heads = theirs["n_heads"], theirs["n_kv_heads"]
    if kv_heads is None and theirs["multi_query_attention"]:
        kv_heads = 1
    return {
        "d_model": theirs["d_model"],
        "n_layers": theirs["n_layers"],
        "n_heads": heads,
        "n_kv_heads": None if kv_heads == heads else kv_heads,
        "mlp_hidden": hidden // 2 if activation == "swiglu" else hidden,  # theirs counts both halves
        "vocab_size": theirs["vocab_size"],
        "padded_vocab_size": theirs["embedding_size"] or theirs["vocab_size"],
        "seq_len": theirs["max_sequence_length"],
        **_norms(theirs),
        "activation": activation,
        "block": "reordered_norm" if theirs["norm_after"] else "sequential",
        "rope_theta": float(theirs["rope_theta"]),
        "tie_embeddings": theirs["weight_tying"],
        "clip_qkv": theirs["clip_qkv"],
        **_init(theirs),
    }


def _norms(theirs: dict[str, Any]) -> dict[str, Any]:
    affine, kind = theirs["layer_norm_with_affine"], theirs["layer_norm_type"]
    bias = theirs["include_bias"] if theirs["bias_for_layer_norm"] is None else theirs["bias_for_layer_norm"]
    if theirs["attention_layer_norm"] and theirs["attention_layer_norm_with_affine"] != affine:
        raise ConfigError(
            "model.attention_layer_norm_with_affine", f"must be {affine}, as layer_norm_with_affine: we have one norm"
        )
    known = {("default", False): "layer_norm_nonparametric", ("default", True): "layer_norm", ("rms", True): "rms_norm"}
    norm = _choice("model.layer_norm_type", (kind, affine), known)
    if bias and norm == "rms_norm":
        raise ConfigError("model.bias_for_layer_norm", "true cannot be expressed beside layer_norm_type: rms")
    bias = "norm" if bias and affine else "none"
    return {"norm": norm, "norm_eps": theirs["layer_norm_eps"], "qk_norm": theirs["attention_layer_norm"], "bias": bias}


def _init(theirs: dict[str, Any]) -> dict[str, Any]:
    init, cutoff = theirs["init_fn"], theirs["init_cutoff_factor"]
    _choice("model.init_fn", init, {"mitchell": "", "normal": ""})
    if (cutoff or (3 if init == "mitchell" else None)) != 3:
        raise ConfigError("model.init_cutoff_factor", f"{cutoff!r} cannot be expressed; first values are cut at 3 deviations")
    return {"init": init, "init_std": theirs["init_std"]}


def _optimizer(theirs: dict[str, Any], max_grad_norm: float | None) -> dict[str, Any]:
    return {
        "name": "adamw",
        "peak_lr": theirs["learning_rate"],
        "betas": list(theirs["betas"]),
        "eps": theirs["eps"],
        "weight_decay": theirs["weight_decay"],
        "decay_embeddings": theirs["decay_embeddings"],
        "decay_norms": theirs["decay_norm_and_bias"],
        "max_grad_norm": math.inf if max_grad_norm is None else max_grad_norm,
    }


def _schedule(theirs: dict[str, Any], peak_lr: float, tokens_per_step: int) -> dict[str, Any]:
    unit = _choice("scheduler.units", theirs["units"], {"steps": 1, "tokens": tokens_per_step})
    name = _choice("scheduler.name", theirs["name"], SCHEDULES)
    start, clip = theirs["warmup_min_lr"], theirs["grad_clip_warmup_steps"]
    has_clip = clip is not None and theirs["grad_clip_warmup_factor"] is not None
    return {
        "schedule": name,
        "warmup_steps": 0 if theirs["name"] == "constant" else math.ceil(theirs["t_warmup"] / unit),
        "warmup_start_ratio": 0.1 if start is None else start / peak_lr,
        "final_lr_ratio": 0.0 if name == "inverse_sqrt" else theirs["alpha_f"],
        "schedule_steps": None if theirs["t_max"] is None else math.ceil(theirs["t_max"] / unit),
        "grad_clip_warmup_steps": math.floor(clip / unit) if has_clip else 0,
        "grad_clip_warmup_factor": theirs["grad_clip_warmup_factor"] if has_clip else 1.0,
    }


def _steps(duration: int | str, tokens_per_step: int, schedule_steps: int | None) -> int:
    """Updates of the run: a number, `2e12T` tokens, or `1ep` epochs, whose length only the data tell."""
    text = str(duration)
    if text.endswith("T"):
        return math.ceil(int(float(text[:-1])) / tokens_per_step)
    if not text.endswith("ep"):
        return int(float(text))
    if schedule_steps is None:
        raise ConfigError("max_duration", f"{text} needs the length of the data; set it in steps or tokens, such as 2e12T")
    return schedule_steps  # the run may be stopped sooner


def _data(theirs: dict[str, Any], eos_id: int) -> dict[str, Any]:
    if theirs["paths"] and theirs["datasets"]:
        raise ConfigError("data.paths", "stands beside data.datasets; OLMo reads one of them")
    datasets = {"olmo": theirs["paths"]} if theirs["paths"] else dict(sorted((theirs["datasets"] or {}).items()))
    sources = {name: {"path": list(paths), "dtype": theirs["memmap_dtype"]} for name, paths in datasets.items()}
    values = {"order": "olmo", "seed": theirs["seed"], "eos_id": eos_id, "document_mask": theirs["generate_doc_lengths"]}
    return values | ({"sources": sources} if sources else {})


def import_olmo(source: Path, dest: Path, left_out: tuple[str, ...] = (), step: int | None = None) -> int:
    """Write an unsharded OLMo checkpoint (model.pt, config.yaml, and optim.pt if it is there) as one of ours; returns the
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

"""What to type instead of a configuration key or file that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

from olmo_train.errors import did_you_mean, near

# Names of other frameworks (OLMo, transformers, nanoGPT, Megatron, litgpt, torchtitan) for keys of a run.
OTHER_NAMES = {
    "optim.peak_lr": ("lr", "learning_rate", "max_lr"),
    "optim.final_lr_ratio": ("min_lr", "alpha_f", "lr_min"),
    "optim.warmup_steps": ("warmup", "t_warmup", "warmup_iters", "lr_warmup_steps"),
    "optim.weight_decay": ("wd",),
    "optim.betas": ("beta1", "beta2", "adam_beta1", "adam_beta2"),
    "optim.max_grad_norm": ("grad_clip", "clip_grad", "max_norm", "gradient_clipping", "gradient_clip_val"),
    "optim.schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_decay_style"),
    "optim.name": ("optimizer",),
    "global_batch_size": ("batch_size", "train_batch_size", "global_train_batch_size"),
    "micro_batch_size": (
        "micro_batch", "microbatch_size", "device_train_microbatch_size", "per_device_train_batch_size", "device_batch_size",
        "gradient_accumulation_steps", "grad_accum_steps",
    ),
    "total_steps": ("max_steps", "max_iters", "train_iters", "num_steps", "n_steps", "steps", "max_duration", "num_iterations"),
    "total_tokens": ("epochs", "num_train_epochs", "max_tokens"),
    "run_dir": ("output_dir", "out_dir", "save_folder", "save_dir", "dump_folder"),
    "resume_from": ("load_path", "resume_from_checkpoint", "load"),
    "model.d_model": ("hidden_size", "n_embd", "dim", "d_embed", "embed_dim"),
    "model.n_layers": ("num_layers", "n_layer", "num_hidden_layers", "depth"),
    "model.n_heads": ("num_heads", "n_head", "num_attention_heads"),
    "model.n_kv_heads": ("num_key_value_heads", "n_query_groups", "num_query_groups"),
    "model.mlp_hidden": ("intermediate_size", "ffn_hidden_size", "hidden_dim", "mlp_hidden_size"),
    "model.seq_len": (
        "block_size", "max_seq_len", "seq_length", "sequence_length", "max_sequence_length", "context_length",
        "max_position_embeddings",
    ),
    "parallel.precision": ("bf16", "mixed_precision"),
    "parallel.activation_checkpointing": ("gradient_checkpointing",),
    "checkpoint.interval_steps": ("save_interval", "save_every"),
    "eval.interval_steps": ("eval_interval", "eval_steps", "eval_every"),
    "log.interval_steps": ("log_interval", "logging_steps"),
    "data.sources.NAME.path": ("dataset", "data_path", "train_data", "data_dir"),
}  # fmt: skip


def near_keys(key: str, known: list[str]) -> list[str]:
    """The keys among `known` (dotted, with NAME and N as in `train --keys`) that an unknown dotted key may mean: those that other
    frameworks call so, those that end in the same word, else those spelled most alike, first in the same section."""
    section, _, word = key.rpartition(".")
    sections = {name[: dot.start()] for name in known for dot in re.finditer(r"\.", name)}
    known = [*known, *sorted(name for name in sections if name.rpartition(".")[2] not in ("NAME", "N"))]
    if named := [name for name in known if word.lower() in OTHER_NAMES.get(name, ())]:
        return named
    last = {name: name.rpartition(".")[2] for name in known}
    if ends := [name for name in known if last[name] == word]:
        return ends[:3]
    beside = {rest.split(".")[0] for name in known if (rest := _within(section, name))}
    if names := near(word, beside):
        return [f"{section}.{name}".lstrip(".") for name in names]
    words = near(word, last.values())
    return [name for name in known if last[name] in words][:3]


def _within(section: str, name: str) -> str:
    """The rest of a known key after its section, in which NAME and N stand for any part; empty for a key of another section."""
    if not section:
        return name
    parts, own = section.split("."), name.split(".")
    fits = len(own) > len(parts) and all(b in (a, "NAME", "N") for a, b in zip(parts, own, strict=False))
    return ".".join(own[len(parts) :]) if fits else ""


def nearest_key(key: str, known: list[str]) -> str:
    """`did you mean 'optim.peak_lr'?`, or the keys of its section when nothing is near."""
    if names := near_keys(key, known):
        return did_you_mean(names)
    section = key.rpartition(".")[0]
    beside = sorted({rest.split(".")[0] for name in known if (rest := _within(section, name))})
    return f"known: {', '.join(beside)}; `olmo-train train --keys` lists all with their meaning"


def no_such_file(file: Path) -> str:
    """Why a word of the command line is no YAML file, and what to type instead."""
    key, equals, text = str(file).partition("=")
    if file.is_dir():
        own = file / "config.yaml"
        return f"is a folder, not a YAML file; {did_you_mean([str(own)]) if own.is_file() else 'name a YAML file in it'}"
    missing = "there is no such configuration file"
    if equals:
        return f"""{missing}; to set a key to this text, put quotes around the value: {key}='"{text}"'"""
    names = near_files(file, "*.y*ml")
    return f"{missing}; {did_you_mean(names) if names else 'name a YAML file, or set a key as KEY=VALUE'}"


def indented_with_tab(content: bytes) -> str:
    """The line of a YAML file that begins with a tab, which YAML forbids, and the fix; empty when there is none."""
    lines = [number for number, line in enumerate(content.splitlines(), 1) if b"\t" in line[: len(line) - len(line.lstrip())]]
    return f"line {lines[0]} is indented with a tab; use spaces" if lines else ""


def near_files(file: Path, pattern: str = "*") -> list[str]:
    """The files or folders beside a missing one whose names, without their suffixes, are spelled most alike."""
    beside = {path.stem: str(path) for path in (file.parent.glob(pattern) if file.parent.is_dir() else ())}
    return [beside[stem] for stem in near(file.stem, beside)]

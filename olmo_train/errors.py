"""The errors that a user can cause or meet, each with the exit code that scripts and schedulers act on.

A UserError's text is one line: what is wrong, the value, and the fix. The command line prints it as
`error: WHERE: text` without a traceback, or as `stopped: WHERE: text` after an orderly stop; any other exception is a bug in
this package and exits 1. Below them: what to type instead of a key or a file that does not exist.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(Exception):
    """Base of all errors that end in one line, which begins with `label`. `where` names a file or a dotted configuration key."""

    exit_code = 1
    label = "error"
    speaks = False  # print it on this rank too: rank 0 may be gone

    def __init__(self, where: object, what: str):
        super().__init__(f"{where}: {what}")
        self.where, self.what = where, what

    def __reduce__(self) -> tuple:  # so that it can be sent to other ranks
        return type(self), (self.where, self.what)


class ConfigError(UserError):  # configuration or usage
    exit_code = 2


class DataError(UserError):
    exit_code = 3


class CheckpointError(UserError):  # no loadable checkpoint
    exit_code = 4


class SaveError(UserError):  # a checkpoint could not be written
    exit_code = 1


class NonFiniteError(UserError):  # training stopped by non-finite values
    exit_code = 5


class ReplicaError(UserError):  # ranks that must hold the same bits do not
    exit_code = 1


class PeerError(UserError):  # a peer was lost or hung
    exit_code = 6


class Stopped(UserError):  # stopped by a signal after saving: the same command again resumes
    exit_code = 75
    label = "stopped"


class BothSet(ConfigError):
    """Two keys that exclude each other are set; `other` is the second one."""

    def __init__(self, where: object, what: str, other: str = ""):
        super().__init__(where, what)
        self.other = other

    def naming(self, origins: dict[str, str]) -> ConfigError:
        """This error with what set the second key: a file, or the command line."""
        return ConfigError(self.where, f"{self.what} ({self.other} is set by {origins[self.other]})")


def reason(problem: Exception) -> str:
    """What an exception says, in one line; of an OSError without its number and file, which the message names already."""
    return getattr(problem, "strerror", None) or " ".join(str(problem).split()) or type(problem).__name__


def near(word: str, known: Iterable[str]) -> list[str]:
    """The known name that is spelled most like `word`, or up to three that contain it, the shortest first."""
    by_lower = {name.lower(): name for name in sorted(known, reverse=True)}
    word = word.lower()
    if close := difflib.get_close_matches(word, by_lower, n=1, cutoff=0.6):
        return [by_lower[close[0]]]
    parts = [name for name in by_lower if word in re.split(r"\W|_", name) or len(word) > 2 and word in name]
    return [by_lower[name] for name in sorted(parts, key=lambda name: (len(name), name))[:3]]


def did_you_mean(names: Sequence[str], otherwise: str = "") -> str:
    """`did you mean 'cosine' or 'constant'?`; `otherwise` if there are no names."""
    return f"did you mean {' or '.join(repr(name) for name in names)}?" if names else otherwise


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'cosine'?`, or the list of what is known when nothing is near."""
    known = sorted(known)
    return did_you_mean(near(word, known), "known: " + ", ".join(known))


def check_choice(where: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that names no row of its table. Raises ConfigError with the nearest row."""
    if value not in known:
        raise ConfigError(where, f"'{value}' is not a choice; {nearest(str(value), known)}")


# Keys and values of other frameworks that this one does not have, by KEY or KEY=VALUE: why, and what to do.
UNSUPPORTED = {
    "adapter.dropout": "is not offered: resuming, replaying and recomputing rely on blocks without random numbers; leave it out",
    "adapter.kind=qlora": "'qlora' is not offered: it needs kernels for 4-bit weights; set lora, with frozen weights in bf16",
    "adapter.kind=dpo": "'dpo' is not offered: it needs pairs of answers and a second model; set lora, and train on responses",
    "adapter.targets.N=embed": "'embed' is not offered: a tied head shares its weights, and merging changes both; leave it out",
    "adapter.targets.N=head": "'head' is not offered: a tied one is the embedding, and merging changes both; leave it out",
    "dpo": "is not offered: it needs pairs of answers and a second model; train on the preferred responses",
}


def not_offered(word: str) -> str | None:
    """Why KEY or KEY=VALUE is not offered, and the remedy; None if UNSUPPORTED does not have it."""
    return UNSUPPORTED.get(re.sub(r"[.]\d+=", ".N=", word.lower()))


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
    "batch_schedule": ("rampup_batch_size", "batch_size_schedule", "batch_size_warmup"),
    "micro_batch_size": (
        "micro_batch", "microbatch_size", "device_train_microbatch_size", "per_device_train_batch_size", "device_batch_size",
        "gradient_accumulation_steps", "grad_accum_steps",
    ),
    "total_steps": ("max_steps", "max_iters", "train_iters", "num_steps", "n_steps", "steps", "max_duration", "num_iterations"),
    "adapter.rank": ("lora_r", "lora_rank"),
    "adapter.alpha": ("lora_alpha",),
    "adapter.targets": ("target_modules", "lora_target"),
    "adapter.lr_ratio": ("loraplus_lr_ratio",),
    "adapter.rank_stabilized": ("use_rslora",),
    "total_tokens": ("max_tokens",),
    "total_epochs": ("epochs", "num_epochs", "num_train_epochs"),
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
    section = key.rpartition(".")[0]
    beside = sorted({rest.split(".")[0] for name in known if (rest := _within(section, name))})
    every = f"known: {', '.join(beside)}; `olmo-train train --keys` lists all with their meaning"
    return did_you_mean(near_keys(key, known), every)


def no_run(folder: Path, what: str) -> str:
    """Why a folder is no run_dir, and what to type instead; `what` if it is none of a checkpoint either."""
    return f"is a checkpoint; name its run_dir, {folder.parent.parent}" if (folder / "MANIFEST.json").is_file() else what


def no_such_file(file: Path, fix: str = "name a YAML file, or set a key as KEY=VALUE") -> str:
    """Why a word of the command line is no YAML file, and what to type instead; `fix` if nothing is spelled like it."""
    key, equals, text = str(file).partition("=")
    if file.is_dir():
        own = file / "config.yaml"
        return f"is a folder, not a YAML file; {did_you_mean([str(own)]) if own.is_file() else 'name a YAML file in it'}"
    missing = "there is no such configuration file"
    if equals and key == "run_dir" and file.name == "config.yaml" and Path(text).is_file():
        return f"ends in .yaml, so it is read as the name of a file; {did_you_mean([f'run_dir={Path(text).parent}'])}"
    if equals:
        what = "ends in .yaml, so it is read as the name of a file, and there is no such file"
        return f"""{what}; to set a key to this text, put quotes around the value: {key}='"{text}"'"""
    names = near_files(file, "*.y*ml") if file.suffix else near_files(file)
    return f"{missing}; {did_you_mean(names, fix)}"


def indented_with_tab(content: bytes) -> str:
    """The line of a YAML file that begins with a tab, which YAML forbids, and the fix; empty when there is none."""
    lines = [number for number, line in enumerate(content.splitlines(), 1) if b"\t" in line[: len(line) - len(line.lstrip())]]
    return f"line {lines[0]} is indented with a tab; use spaces" if lines else ""


def near_files(file: Path, pattern: str = "*") -> list[str]:
    """The files or folders beside a missing one whose names, without their suffixes, are spelled most alike."""
    beside = {path.stem: str(path) for path in (file.parent.glob(pattern) if file.parent.is_dir() else ())}
    return [beside[stem] for stem in near(file.stem, beside)]

"""Config changes allowed on resume: keys that do not affect the training; the rest need allow_changes."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import torch

from olmo_train.config import REMOVED, build, flatten, read, to_dict
from olmo_train.errors import ConfigError
from olmo_train.formats import counted
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.transformer import Transformer

# Keys whose change does not alter the weights after a step (up to the rounding of sums).
HARMLESS = (
    "run_dir", "resume", "resume_from", "allow_changes",
    "init_from",  # with adapters its hash is compared; see folders.base_of
    "micro_batch_size", "log.*", "checkpoint.*", "eval.*",
    "guards.*", "profile.*", "parallel.shard", "parallel.replicas", "parallel.activation_checkpointing", "parallel.compile",
    "parallel.cpu_kernels", "data.validation", "data.validation.*", "data.check_tokenizer",
    "data.deny",  # which documents it denies is compared; see check_denied
    "data.sources.*.path*",  # the contents are compared by their hashes
    "total_steps", "total_tokens", "total_epochs",  # a run may be made longer; see schedule_warnings
)  # fmt: skip
# Keys that configurations saved by earlier versions do not have, and the values that equal what these versions did.
OLDER = flatten(
    {"adapter": to_dict(AdapterConfig()), "batch_schedule": [], "optim": {"decay_shape": "linear", "lr_batch_scaling": "none"}}
)
ADAPTER_SHAPES = {"adapter.kind", "adapter.rank", "adapter.targets"}
# Keys of the model that decide how weights are drawn and trained, not what they compute.
TRAINED_WITH = {"vocab_size", "seq_len", "z_loss", "init", "init_std"}
ANOTHER_MODEL = "which would train another model; set it back, choose another run_dir"


def _is_allowed(key: str, allowed: tuple[str, ...]) -> bool:
    """Whether `allowed`, dotted keys or their beginnings, names the key."""
    return any(key == name or key.startswith(name + ".") for name in allowed)


def _refuse(key: str, change: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless the key is allowed."""
    if not _is_allowed(key, allowed):
        raise ConfigError(key, f"{change}, or set allow_changes=[{key}]")


def check_changes(saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Compare two resolved configurations. Raises ConfigError with all keys, each with both values, whose change alters the
    training and that `allowed` does not name. A change of a weight's shape cannot be allowed."""
    before, after = OLDER | flatten(saved), flatten(now)
    for flat, config in ((before, saved), (after, now)):
        flat["data.sources"] = list(config["data"]["sources"])  # the order of the sources affects the order of the data
    changed = [key for key in sorted((before.keys() | after.keys()) - REMOVED.keys()) if before.get(key) != after.get(key)]
    # Without adapters nothing reads their other keys.
    unread = ("adapter.*",) if before["adapter.kind"] == after["adapter.kind"] == "none" else ()
    keys = [key for key in changed if not any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS + unread)]
    reshaped = any(key.startswith("model.") for key in keys) and _shapes(saved) != _shapes(now)
    shapes = {key for key in keys if key in ADAPTER_SHAPES or (reshaped and key.startswith("model."))}
    refused = [key for key in keys if key in shapes or not _is_allowed(key, allowed)]
    if not refused:
        return
    changes = "; ".join(f"{key} is {after.get(key)!r} now and was {before.get(key)!r}" for key in refused)
    change = changes.removeprefix(f"{refused[0]} ")  # which the error begins with
    it = "it" if len(refused) == 1 else "them"
    fix = f"which would train another model; set {it} back, choose another run_dir, or set allow_changes=[{','.join(refused)}]"
    if shapes:
        fix = f"which would change the shape of the weights; set {it} back, or choose another run_dir"
    raise ConfigError(refused[0], f"{change} when this run was saved, {fix}")


def _shapes(config: dict[str, Any]) -> dict[str, torch.Size] | None:
    """The shape of each weight of a resolved configuration; None if it has no model or none that this version can build."""
    try:
        with torch.device("meta"):
            model = Transformer(build(ModelConfig, config.get("model", {}), "model"))
    except ConfigError:
        return None
    return {name: weight.shape for name, weight in model.named_parameters()}


def check_init(folder: Path, model: ModelConfig, allowed: tuple[str, ...]) -> None:
    """Compare the model with the one that the weights of `folder` were trained in, which a run starts from or freezes: another
    number of heads, for example, fits their shapes and computes something else. Raises ConfigError with all keys, each with both
    values, that differ and that `allowed` does not name. Other shapes cannot be allowed."""
    try:
        saved = build(ModelConfig, read([folder / "config.yaml"])["model"], "model")
    except (ConfigError, KeyError):  # one that this version cannot build; shapes are compared when the weights are loaded
        return
    before, now = to_dict(saved), to_dict(model)
    sizes = [{"n_kv_heads": m.kv_heads, "head_dim": m.head_size, "padded_vocab_size": m.vocab_rows} for m in (saved, model)]
    same = TRAINED_WITH | {key for key, size in sizes[0].items() if size == sizes[1][key]}  # null stands for one of these sizes
    changed = [f"model.{key}" for key in now if before[key] != now[key] and key not in same]
    reshaped = bool(changed) and _shapes({"model": before}) != _shapes({"model": now})
    refused = [key for key in changed if reshaped or not _is_allowed(key, allowed)]
    if not refused:
        return
    before, now = flatten({"model": before}), flatten({"model": now})
    values = "; ".join(f"{key} is {now[key]!r} here and was {before[key]!r}" for key in refused)
    what = f"{values.removeprefix(f'{refused[0]} ')} when the weights of init_from were trained ({folder})"
    fix = f"set {'it' if len(refused) == 1 else 'them'} back"
    if not reshaped:
        fix += f", or set allow_changes=[{','.join(refused)}]"
    raise ConfigError(refused[0], f"{what}; {fix}")


def check_adapters(folder: Path, saved: dict[str, Any], adapter: AdapterConfig, are_there: bool) -> None:
    """Raise ConfigError when the adapters of the configuration are not those of the checkpoint `folder`. `are_there`: whether it
    holds any."""
    if adapter.is_on != are_there:
        what = f"is {adapter.kind}, and {folder} holds {'adapters' if are_there else 'no adapters'}"
        raise ConfigError("adapter.kind", f"{what}; set it to the kind of that run, or start from its weights with init_from")
    if not are_there:
        return
    before, now = flatten({"adapter": saved["adapter"]}), flatten({"adapter": to_dict(adapter)})
    for key in sorted(ADAPTER_SHAPES):
        if before[key] != now[key]:
            raise ConfigError(key, f"is {now[key]!r}, and the adapters of {folder} have {before[key]!r}; set it to theirs")


def check_skip_steps(saved: dict[str, Any], now: dict[str, Any], last_step: int, allowed: tuple[str, ...]) -> None:
    """guards.skip_steps may change for future steps, not for finished ones. Raises ConfigError."""
    before, after = (set(config["guards"].get("skip_steps", ())) for config in (saved, now))
    for step in sorted(step for step in before ^ after if step <= last_step):
        _refuse(
            "guards.skip_steps",
            f"differ in step {step}, which is before the checkpoint of step {last_step} that this run resumes from; "
            f"delete the checkpoints after step {step - 1}, set it back",
            allowed,
        )


def check_denied(saved: dict[str, Any] | None, now: dict[str, Any] | None, allowed: tuple[str, ...]) -> None:
    """Compare which documents data.deny denies, whatever file lists them. Raises ConfigError when they differ."""
    if saved != now:
        was = f"{_counted(saved)}{' others' * bool(saved and now)}"
        _refuse("data.deny", f"denies {_counted(now)} now and denied {was} when this run was saved, {ANOTHER_MODEL}", allowed)


def _counted(denied: dict[str, Any] | None) -> str:
    parts = [f"{counted(n, 'document')} of {name}" for name, n in denied["documents"].items()] if denied else ["nothing"]
    return " and ".join(parts)


def check_data(saved: dict[str, str], now: dict[str, str], allowed: tuple[str, ...]) -> None:
    """Compare the hashes of the data. Raises ConfigError on a source whose contents differ."""
    for name in sorted(saved.keys() & now.keys()):
        if saved[name] != now[name]:
            hashes = f"hash {now[name][:12]}, was {saved[name][:12]}"
            what = f"differs from the data that this run was trained on ({hashes}); restore the files, choose another run_dir"
            _refuse(f"data.sources.{name}", what, allowed)

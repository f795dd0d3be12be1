"""Our training beside OLMo's own: the same weights, files and recipe, 200 steps of each, step by step.

    python tests/references/olmo_parity.py [--output DIR]

makes an environment for ai2-olmo 0.6.0 where there is none (its pins do not fit ours; OLMO_ENV names another place), runs
OLMo's trainer in it and ours here, prints how far they are apart, and writes golden_olmo.json, which test_olmo_curve.py
holds every later version to, and docs/olmo-parity.png. Some three minutes on one core.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import safetensors.torch
import torch
import yaml
from conftest import EOS_ID, VOCAB_SIZE, markov_stream

from olmo_train import config
from olmo_train.convert import olmo as convert
from olmo_train.model.config import ModelConfig
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer
from olmo_train.optim.schedules import max_grad_norm_at
from olmo_train.train import train
from olmo_train.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden_olmo.json"
ENVIRONMENT = Path(os.environ.get("OLMO_ENV", Path.home() / ".cache/olmo_train/ai2-olmo-0.6.0"))
REQUIREMENTS = ["ai2-olmo==0.6.0", "numpy<2", "pandas<2.3", "pyarrow<20", "datasets<4", "scikit-learn<1.6", "wandb",
                "torchmetrics", f"torch=={torch.__version__.split('+')[0]}"]  # fmt: skip
STEPS = 200
TOKENS = torch.randint(VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(5)).tolist()

MODEL = {
    "d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 192, "weight_tying": False, "alibi": False, "rope": True,
    "flash_attention": False, "attention_dropout": 0.0, "attention_layer_norm": False, "include_bias": False,
    "block_type": "sequential", "layer_norm_type": "default", "layer_norm_with_affine": False, "bias_for_layer_norm": False,
    "attention_layer_norm_with_affine": False, "activation_type": "swiglu", "residual_dropout": 0.0, "embedding_dropout": 0.0,
    "max_sequence_length": 64, "vocab_size": VOCAB_SIZE, "embedding_size": VOCAB_SIZE, "eos_token_id": EOS_ID,
    "pad_token_id": 1, "init_device": "cpu", "init_fn": "mitchell",
}  # fmt: skip
RUN = {
    "seed": 6198, "max_duration": STEPS, "stop_at": STEPS, "precision": "fp32",
    "global_train_batch_size": 8, "device_train_microbatch_size": 4,
    "distributed_strategy": "ddp", "fsdp": None, "ddp": {"grad_sync_mode": "batch"}, "save_interval": None,
    "console_log_interval": 1, "save_overwrite": True, "wandb": None, "max_grad_norm": 1.2, "eval_interval": 1000,
    "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
    "scheduler": {"name": "linear_with_warmup", "t_warmup": 20, "alpha_f": 0.1},
}  # fmt: skip
VARIANTS = {
    "untied": {},
    "tied, GQA": {
        "model": {"weight_tying": True, "n_kv_heads": 2},
        "scheduler": {"name": "cosine_with_warmup", "grad_clip_warmup_steps": 30, "grad_clip_warmup_factor": 1.1},
        "max_grad_norm": 1.35,
    },
    "OLMo2": {
        "model": {
            "layer_norm_type": "rms", "layer_norm_with_affine": True, "layer_norm_eps": 1e-6, "attention_layer_norm": True,
            "attention_layer_norm_with_affine": True, "norm_after": True, "rope_theta": 500_000, "init_fn": "normal",
            "init_cutoff_factor": 3.0,
        },
        "max_grad_norm": 1.0,
        "softmax_auxiliary_loss": True,  # the multiplier of 0.6.0 is 1e-4, whatever its file says
        # At 1e-3, gradient norms of this run differ by up to 6e-4 when the micro-batch alone changes: rounding is amplified.
        "optimizer": {"decay_norm_and_bias": True, "learning_rate": 5e-4},
        "scheduler": {"warmup_min_lr": 0.0},
    },
}  # fmt: skip
SCHEDULES = [
    {"scheduler": {"name": name, "t_warmup": 100, "alpha_f": 0.1, **more}, "peak": 3e-4, "max_steps": 1000,
     "steps": [0, 1, 50, 99, 100, 101, 500, 999, 1000, 1500]}
    for name in ("linear_with_warmup", "cosine_with_warmup", "inverse_sqrt_with_warmup", "constant_with_warmup", "constant")
    for more in ({}, {"warmup_min_lr": 0.0, "t_max": 700})
]  # fmt: skip


def settings_of(name: str, folder: Path) -> dict:
    """The OLMo configuration of a variant, its files in `folder`."""
    settings = {**RUN, "model": MODEL, "save_folder": str(folder / name / "run")}
    for key, change in VARIANTS[name].items():
        settings[key] = {**settings[key], **change} if isinstance(change, dict) else change
    files = [str(folder / file) for file in ("tokens-0.npy", "tokens-1.npy")]
    return {**settings, "data": {"paths": files, "memmap_dtype": "uint16", "drop_last": True, "num_workers": 0}}


def prepare(folder: Path) -> None:
    """Two token files whose last instances are dropped: 1004 instances, 125 steps an epoch, 4 instances left over."""
    stream = markov_stream(64_337)
    for i, part in enumerate((stream[:40_013], stream[40_013:])):
        (folder / f"tokens-{i}.npy").write_bytes(part.tobytes())
    for name in VARIANTS:
        (folder / name).mkdir()
        (folder / name / "olmo.yaml").write_text(yaml.safe_dump(settings_of(name, folder)))
        convert.import_olmo(folder / name / "olmo.yaml", folder / name / "ours.yaml")


def our_config(name: str, folder: Path, **changes):
    values = {"run_dir": folder / name / "ours", "log.interval_steps": 1, "log.wandb.mode": "disabled",
              "checkpoint.interval_steps": 1000, **changes}  # fmt: skip
    return config.load(TrainConfig, [folder / name / "ours.yaml"], [f"{key}={value}" for key, value in values.items()])


def first_weights(shape: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Transformer(shape)
    return {name: initial_value(name, p.shape, shape, seed) for name, p in model.named_parameters()}


def their_names(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    for i in range(sum(name.endswith("attn.wo.weight") for name in ours)):
        for name, theirs in convert.NAMES.items():
            if name.format(i=i) in ours and ("{i}" in name or i == 0):
                parts.setdefault(theirs.format(i=i), []).append(ours[name.format(i=i)])
    return {name: torch.cat(held) for name, held in parts.items()}


def our_curves(run) -> dict[str, list[float]]:
    curves = {"loss": [], "grad_norm": [], "lr": []}
    for stats in train(run):
        for key, value in (("loss", stats.loss), ("grad_norm", stats.grad_norm), ("lr", stats.lr)):
            curves[key].append(float(value))
    return curves


def apart(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, float]:
    """Largest differences over the steps of `ours`, which are the last ones of `theirs`."""
    pairs = {key: list(zip(ours[key], theirs[key][-len(ours[key]) :], strict=True)) for key in ours}
    relative = max(abs(a - b) / b for a, b in pairs["grad_norm"])
    return {
        "loss": max(abs(a - b) for a, b in pairs["loss"]),
        "grad_norm": relative,
        "lr": max(abs(a - b) for a, b in pairs["lr"]),
    }


def environment() -> Path:
    """The Python of the reference's environment, made if it is not there."""
    python = ENVIRONMENT / "bin/python"
    if not (ENVIRONMENT / "complete").is_file():
        print(f"making {ENVIRONMENT}: {' '.join(REQUIREMENTS)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


def run_reference(folder: Path) -> tuple[dict, dict]:
    """OLMo's curves and facts, and checkpoints in folder/VARIANT/step100-unsharded."""
    prepare(folder)
    for name in VARIANTS:
        ours = our_config(name, folder)
        safetensors.torch.save_file(their_names(first_weights(ours.model, ours.seed)), folder / name / "first.safetensors")
    job = {"variants": list(VARIANTS), "tokens": TOKENS, "schedules": SCHEDULES}
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).parent / "olmo_reference.py"
    out = subprocess.run([environment(), script, folder / "job.json"], capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads((folder / "curves.json").read_text()), json.loads((folder / "facts.json").read_text())


def check_logits(name: str, folder: Path, model: Transformer) -> tuple[float, float]:
    theirs = safetensors.torch.load_file(folder / name / "logits.safetensors")["logits"]
    with torch.no_grad():
        difference = model(torch.tensor(TOKENS)) - theirs
    return difference.abs().max().item(), (difference.norm() / theirs.norm()).item()


def plot(curves: dict[str, tuple[dict, dict]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(3, len(curves), figsize=(4 * len(curves), 8), sharex=True, squeeze=False)
    for column, (name, (ours, theirs)) in enumerate(curves.items()):
        for row, (key, label) in enumerate((("loss", "loss (nats)"), ("grad_norm", "gradient norm"))):
            rows[row][column].plot(range(1, STEPS + 1), theirs[key], lw=3, color="0.75", label="ai2-olmo 0.6.0")
            rows[row][column].plot(range(1, STEPS + 1), ours[key], lw=0.8, color="C0", label="olmo_train")
            rows[row][0].set_ylabel(label)
        gaps = [max(abs(a - b), 1e-9) for a, b in zip(ours["loss"], theirs["loss"], strict=True)]
        rows[2][column].semilogy(range(1, STEPS + 1), gaps, lw=0.8)
        rows[2][column].axhline(1e-4, color="C3", lw=0.8, ls="--", label="the test fails above")
        rows[2][column].set(xlabel="step", ylim=(1e-9, 1e-3))
        rows[0][column].set_title(name)
    rows[2][0].set_ylabel("|difference of losses|")
    rows[0][0].legend()
    rows[2][0].legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="keep the files of both runs here")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    folder = (output or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    theirs, facts = run_reference(folder)
    curves = {}
    for name in VARIANTS:
        ours = our_curves(our_config(name, folder))
        curves[name] = ours, theirs[name]
        convert.import_olmo(folder / name / f"step{STEPS // 2}-unsharded", folder / name / "imported")
        rest = our_curves(our_config(name, folder, run_dir=folder / name / "rest", resume_from=folder / name / "imported"))
        weights, shape = first_weights(our_config(name, folder).model, 6198), our_config(name, folder).model
        model = Transformer(shape).eval()
        model.load_state_dict(weights)
        limits = [max_grad_norm_at(step, our_config(name, folder).optim) for step in range(1, STEPS + 1)]
        clipped = sum(norm > limit for norm, limit in zip(theirs[name]["grad_norm"], limits, strict=True))
        print(f"{name}: {clipped} of {STEPS} steps clipped, loss {theirs[name]['loss'][0]:.3f} -> {theirs[name]['loss'][-1]:.3f}")
        print("  200 steps apart by", apart(ours, theirs[name]))
        print(f"  from step {STEPS // 2} of OLMo's checkpoint, apart by", apart(rest, theirs[name]))
        print("  logits apart by {:.1e}, relative {:.1e}".format(*check_logits(name, folder, model)))
    GOLDEN.write_text(json.dumps({"curves": theirs, **facts}, indent=None, separators=(",", ":")) + "\n")
    plot(curves, ROOT / "docs/olmo-parity.png")
    if output is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

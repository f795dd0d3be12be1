"""Run folders as training writes them, made up but true to life: warmup, decay, spikes, a skip, a resume, evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SOURCES = {"web": 0.0, "code": -0.7, "books": 0.25}  # nats above or below the mean
TOKENS_PER_STEP = 32 * 512
STEP_SECONDS, PAUSE_SECONDS = 0.31, 7200.0


def make_run(
    run_dir: Path,
    steps: int = 2000,
    interval: int = 10,
    peak_lr: float = 3e-4,
    seed: int = 0,
    spikes: tuple[int, ...] = (),
    resume_at: int | None = None,
    width: int = 256,
) -> Path:
    """Write metrics.jsonl, events.jsonl and config.yaml; every `interval`-th step is logged. Returns run_dir."""
    run_dir.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    events = [{"event": "start", "step": 0, "time": 1.7e9, "attempt": 1}]
    time, attempt = 1.7e9, 1
    every = max(interval, steps // 20 // interval * interval)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(interval, steps + 1, interval):
            if resume_at is not None and step > resume_at and attempt == 1:
                events.append({"event": "signal", "step": resume_at, "time": time + 1, "signal": "SIGTERM"})
                time, attempt = time + PAUSE_SECONDS, 2
                events.append({"event": "resume", "step": resume_at, "time": time, "attempt": 2})
            time += STEP_SECONDS * interval
            spike = any(abs(step - s) < interval for s in spikes)
            row = {"step": step, "time": time, "attempt": attempt, "world_size": 1, "sample_hash": f"{step:064x}"}
            row |= _metrics(step, steps, peak_lr, spike, rng)
            if spike:
                events.append({"event": "spike", "step": step, "time": time, "loss": row["train/CrossEntropyLoss"]})
            if step % every == 0:
                row |= _evaluations(step, steps, rng)
                events += [{"event": kind, "step": step, "time": time} for kind in ("evaluation", "save")]
            file.write(json.dumps(row) + "\n")
    if spikes:
        events.append({"event": "skip", "step": spikes[-1] + 3 * interval, "time": time, "reason": "non-finite"})
    (run_dir / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (run_dir / "config.yaml").write_text(
        f"run_dir: {run_dir}\nseed: {seed}\ntotal_steps: {steps}\nmodel: {{d_model: {width}, n_layers: 4}}\n"
        f"optim: {{peak_lr: {peak_lr}, max_grad_norm: 1.0}}\ndata: {{sources: {{web: {{path: data/web}}}}}}\n"
    )
    return run_dir


def _mean_loss(step: int, steps: int) -> float:
    return 2.9 + 7.6 * (1 + step / (0.02 * steps)) ** -0.75


def _metrics(step: int, steps: int, peak_lr: float, spike: bool, rng: np.random.Generator) -> dict[str, Any]:
    warmup = max(1, steps // 20)
    loss = _mean_loss(step, steps) + 2e-5 / peak_lr + rng.normal(0, 0.03) + 2.1 * spike
    norm = (0.35 + 2.5 * np.exp(-step / (0.03 * steps)) + abs(rng.normal(0, 0.05))) * (40 if spike else 1)
    warm, decayed = 0.1 + 0.9 * min(1, step / warmup), 1 - 0.9 * (step - warmup) / (steps - warmup)
    return {
        "skipped": 0,
        "train/CrossEntropyLoss": loss,
        "train/Perplexity": float(np.exp(loss)),
        "train/BitsPerByte": float(loss / np.log(2) / 3.6),
        **{f"train/source/{s}/CrossEntropyLoss": loss + d + rng.normal(0, 0.05) for s, d in SOURCES.items()},
        "optim/total_grad_norm": float(norm),
        "optim/clipping_rate": float(norm > 1),
        "optim/learning_rate_group0": peak_lr * (warm if step < warmup else decayed),
        "throughput/total_tokens": step * TOKENS_PER_STEP,
        "throughput/total_flops": step * TOKENS_PER_STEP * 6 * 2.1e6,
        "throughput/tokens_per_second": 52000 + rng.normal(0, 900),
        "throughput/device/tokens_per_second": 52000 + rng.normal(0, 900),
        "throughput/mfu": 0.41 + rng.normal(0, 0.006),
        "throughput/step_seconds": STEP_SECONDS + abs(rng.normal(0, 0.01)),
        "throughput/data_wait_seconds": abs(rng.normal(0, 0.002)),
    }


def _evaluations(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    loss = _mean_loss(step, steps)
    return {
        "eval/web/CrossEntropyLoss": loss + 0.06 + 0.1 * step / steps,
        "eval/code/CrossEntropyLoss": loss * 0.8 + 0.2,
        "eval/downstream/piqa_acc": 0.5 + 0.2 * step / steps + rng.normal(0, 0.01),
        "eval/downstream/sciq_acc": 0.25 + 0.5 * step / steps + rng.normal(0, 0.01),
    }

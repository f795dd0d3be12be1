"""Error rates of the spike detector: false spikes in healthy runs, and planted spikes that are not found.

    python tests/benchmarks/spikes.py DATA FOLDER [--runs 48]

DATA holds the sources `plays` and `python`, as `make train` prepares them in data/first-run. FOLDER keeps the loss and the
gradient norm of each step of each run: a run is trained once, and the rates are computed again in seconds. The constants of
olmo_train/guards/spikes.py were chosen on the first CHOSEN_ON runs; the later ones measure them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from olmo_train import config as configuration  # noqa: E402
from olmo_train.data.mixture import Mixture  # noqa: E402
from olmo_train.guards.spikes import SpikeDetector  # noqa: E402
from olmo_train.model.init import initial_value  # noqa: E402
from olmo_train.model.transformer import Transformer  # noqa: E402
from olmo_train.optim.build import build_optimizer, set_lr  # noqa: E402
from olmo_train.optim.schedules import lr_at  # noqa: E402
from olmo_train.train_config import TrainConfig  # noqa: E402

CHOSEN_ON = 19
STEPS = 500  # of a healthy run
PLANTED_AT = tuple(range(180, STEPS + 1, 40))  # steps with planted spikes: by then a model has learned enough to be surprised
RATE, RATE_STEPS = 100, (120, 20)  # another run trains 120 steps, then 20 at 100 times its peak rate
GRADIENT = 10  # the factor of a gradient that is too long


def words(run: int, data: Path) -> list[str]:
    """The configuration of run number `run`, drawn at random: 128 to 2048 tokens a step, peak rates from 5e-4 to 6e-3."""
    draw = random.Random(run)
    vocab = json.loads((data / "plays" / "meta.json").read_text())["vocab_size"]
    batch, seq_len, most = 1, 10**9, 2048 if run % 16 == 1 else 512  # tokens: large batches cost the most, and have little noise
    while batch * seq_len > most:
        batch, seq_len = draw.choice([(2, 64), (8, 64), (16, 64), (4, 128), (16, 128), (2, 256), (8, 256), (2, 512)])
    rate = round(5e-4 * 12 ** draw.random(), 5)
    sources = draw.choice([("plays", "python"), ("plays", "python"), ("plays",), ("python",)])
    d_model, layers, warmup = draw.choice([32, 32, 64]), 2, draw.choice([20, 50, 100])
    values = {
        "run_dir": "unused", "seed": run, "total_steps": STEPS, "global_batch_size": batch, "micro_batch_size": batch,
        "model.d_model": d_model, "model.n_layers": layers, "model.n_heads": 4, "model.mlp_hidden": d_model * 8 // 3,
        "model.seq_len": seq_len, "model.vocab_size": vocab, "model.padded_vocab_size": vocab, "model.tie_embeddings": True,
        "optim.peak_lr": rate, "optim.warmup_steps": warmup, "parallel.precision": "fp32",
    }  # fmt: skip
    values |= {f"data.sources.{name}.path": data / name for name in sources}
    values |= {f"data.sources.{name}.weight": {"plays": 0.6, "python": 0.4}[name] for name in sources}
    return [f"{key}={value}" for key, value in values.items()]


def bad_batches(tokens: Tensor, vocab: int, seed: int) -> dict[str, Tensor]:
    """{what is wrong: tokens (rows, T + 1)} in place of a healthy batch."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(1, vocab, tokens.shape, generator=draw)
    half = len(tokens) // 2
    return {
        "random tokens": noise,
        "half of the batch random": torch.cat((noise[:half], tokens[half:])),
        "one token repeated": noise[:1, :1].expand_as(tokens),
    }


def first_model(config: TrainConfig) -> Transformer:
    model = Transformer(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config.model, config.seed))
    return model


def backward(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of tokens (rows, T + 1) in nats, and the norm of its gradient, which the model holds afterwards, clipped."""
    labels = tokens[:, 1:].contiguous()
    loss = model(tokens[:, :-1].contiguous(), labels).sum() / labels.numel()
    loss.backward()
    return loss.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def trajectory(config: TrainConfig, too_high: bool = False) -> dict[str, Any]:
    """Train as olmo_train.train does, on one process without checkpoints, and return the loss and gradient norm of each step.
    Those of planted spikes too, at the weights of their step: a bad batch takes no update, so the run stays healthy.
    `too_high`: the run of RATE_STEPS, without other planted spikes."""
    mixture = Mixture(config.data, config.seed, config.global_batch_size, config.model.seq_len, config.model.vocab_size)
    model, steps, plants = first_model(config), [], []
    optimizer = build_optimizer(dict(model.named_parameters()), config.optim)
    for step in range(1, (sum(RATE_STEPS) if too_high else STEPS) + 1):
        tokens = torch.from_numpy(mixture.read(mixture.global_batch(step)))
        bad = bad_batches(tokens, config.model.vocab_size, step) if step in PLANTED_AT and not too_high else {}
        for kind, bad_tokens in bad.items():
            loss, norm = backward(model, bad_tokens)
            optimizer.zero_grad()
            plants.append({"kind": kind, "step": step, "loss": loss.item(), "grad_norm": norm.item()})
        loss, norm = backward(model, tokens)
        steps.append((loss.item(), norm.item()))
        lr = lr_at(step, config.optim, config.steps)
        set_lr(optimizer, RATE * config.optim.peak_lr if too_high and step > RATE_STEPS[0] else lr)
        optimizer.step()
        optimizer.zero_grad()
    return {"steps": steps, "plants": plants}


def judged(steps: list[tuple[float, float]], plants: list[dict[str, Any]] = ()) -> tuple[list[int], list[tuple[str, bool]]]:
    """The steps that the detector calls spikes, and for each planted spike whether it is found. A planted one is judged by a
    copy of the detector, which then forgets it."""
    detector, spikes, found = SpikeDetector(torch.device("cpu")), [], []
    for step, (loss, norm) in enumerate(steps, 1):
        for plant in (plant for plant in plants if plant["step"] == step):
            copy = SpikeDetector(torch.device("cpu"), detector.state())
            found.append((plant["kind"], bool(copy.judge(torch.tensor(plant["loss"]), torch.tensor(plant["grad_norm"])))))
        if detector.judge(torch.tensor(loss), torch.tensor(norm)):
            spikes.append(step)
    return spikes, found


def split_losses(steps: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Losses of the last steps at the healthy rate, and of as many at the rate that is too high."""
    losses, (start, length) = [loss for loss, _ in steps], RATE_STEPS
    return losses[start - length : start], losses[start : start + length]


def rates(runs: dict[int, list[dict[str, Any]]]) -> list[str]:
    """A table of both error rates over these runs: number: [healthy, with a rate too high]."""
    false, planted = {}, {}
    for run, (healthy, diverging) in runs.items():
        steps = healthy["steps"][:STEPS]
        longer = [
            {"kind": f"gradient x {GRADIENT}", "step": step, "loss": loss, "grad_norm": norm * GRADIENT}
            for step, (loss, norm) in enumerate(steps, 1) if step in PLANTED_AT
        ]  # fmt: skip
        false[run], found = judged(steps, healthy["plants"] + longer)
        before, after = split_losses(diverging["steps"])
        rises = "loss rises" if statistics.median(after) > statistics.median(before) else "loss keeps falling"
        found += [(f"learning rate x {RATE}, {rises}", any(step > RATE_STEPS[0] for step in judged(diverging["steps"])[0]))]
        for kind, is_found in found:
            planted.setdefault(kind, []).append(is_found)
    wrong = {run: steps for run, steps in false.items() if steps}
    lines = [f"{len(runs)} healthy runs of {STEPS} steps: {len(wrong)} with a false spike  {wrong or ''}"]
    return lines + [f"{kind}: {sum(found)} of {len(found)} found" for kind, found in planted.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    runs = {}
    for run in range(1, options.runs + 1):
        config = configuration.load(TrainConfig, [], words(run, options.data))
        kept = []
        for kind in ("healthy", "rate"):
            file = options.folder / f"{kind}-{run:03d}.json"
            if not file.exists():
                file.write_text(json.dumps(trajectory(config, too_high=kind == "rate")))
            kept.append(json.loads(file.read_text()))
        print(f"run {run}: loss {kept[0]['steps'][0][0]:.2f} to {kept[0]['steps'][STEPS - 1][0]:.2f}", flush=True)
        runs[run] = kept
    for name, later in (("runs on which the constants were chosen", False), ("later runs", True)):
        print(f"\n{name}", *rates({run: kept for run, kept in runs.items() if (run > CHOSEN_ON) == later}), sep="\n  ")


if __name__ == "__main__":
    main()

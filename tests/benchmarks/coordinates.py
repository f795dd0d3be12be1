"""The coordinate check: how the size of activations depends on the width, after a few updates.

    python tests/benchmarks/coordinates.py [--parametrization mup] [--output FILE.png]

With mup no activation grows or shrinks with the width (Yang et al. 2022, appendix D.1); under the standard parametrization they
grow. The model has 3 blocks with heads of 16 dimensions; each width trains on the same few batches.
"""

import argparse
import math
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from conftest import markov_stream
from runs import first_model

from olmo_train.model.config import ModelConfig
from olmo_train.optim.build import build_optimizer, set_lr
from olmo_train.optim.config import OptimConfig
from olmo_train.run.build import scaling_of

Sizes = dict[tuple[str, int], float]  # by the name of a block, or "logits", and the step
BASE, WIDTHS, STEPS, BATCH, T, VOCAB = 64, (64, 128, 256, 512), (1, 4, 10), 8, 32, 32


def shape(width: int, parametrization: str, depth: int = 3, **changes) -> ModelConfig:
    base = {} if parametrization == "standard" else {"base_width": BASE}
    base |= {"base_depth": 3} if parametrization == "completep" else {}
    values = {"n_heads": width // 16, "mlp_hidden": 2 * width, "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "seq_len": T}
    values |= {"init": "normal", "init_std": 0.1, "parametrization": parametrization, **base, **changes}
    return ModelConfig(d_model=width, n_layers=depth, **values)


def start(config: ModelConfig, optim: OptimConfig, seed: int, steps: int, scaling=None):
    """The model, its optimizer and the batches of `steps`."""
    model = first_model(config, seed)
    model.head.weight.data.zero_()  # else logits begin as noise that shrinks with the width
    optimizer = build_optimizer(dict(model.named_parameters()), optim, scaling=scaling or scaling_of(config))
    set_lr(optimizer, optim.peak_lr)
    stream = torch.tensor(markov_stream(steps * BATCH * (T + 1), seed)).view(steps, BATCH, T + 1) % VOCAB
    return model, optimizer, stream


def update(model, optimizer, tokens) -> float:
    loss = model(tokens[:, :-1], tokens[:, 1:]).sum() / (BATCH * T)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def loss_after(config: ModelConfig, optim: OptimConfig, seed: int, steps: int = 80) -> float:
    """The mean loss of the last 10 steps, with 10 steps of warmup and a linear decay to 0."""
    model, optimizer, stream = start(config, optim, seed, steps)
    losses = []
    for i, tokens in enumerate(stream):
        set_lr(optimizer, optim.peak_lr * min(1, (i + 1) / 10) * (1 - i / steps))
        losses.append(update(model, optimizer, tokens))
    return statistics.fmean(losses[-10:])


def sizes(config: ModelConfig, optim: OptimConfig, seed: int, scaling=None) -> Sizes:
    """{(name of a block or logits, step): mean of |activation|} on the batch of the step, after `step` updates less one."""
    model, optimizer, stream = start(config, optim, seed, max(STEPS), scaling)
    found: Sizes = {}

    def note(name, module, inputs, output):
        found[name, step] = output.detach().abs().mean().item()

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(partial(note, f"block {i + 1}"))
    for step, tokens in enumerate(stream, 1):
        if step in STEPS:
            with torch.no_grad():
                found["logits", step] = model(tokens[:, :-1]).abs().mean().item()
        update(model, optimizer, tokens)
    return {key: size for key, size in found.items() if key[1] in STEPS}


def check(parametrization: str, name: str = "adamw", lr: float = 0.006, seeds: int = 2, fault=None) -> Sizes:
    """{(name, step): slope of log |activation| over log width}, of the mean over seeds. `fault` changes the scaling."""
    by_width = {width: mean_sizes(shape(width, parametrization), name, lr, seeds, fault) for width in WIDTHS}
    logs = [math.log(width) for width in WIDTHS]
    return {
        key: statistics.linear_regression(logs, [math.log(by_width[width][key]) for width in WIDTHS]).slope
        for key, size in by_width[BASE].items()
        if size  # logits are 0 at step 1
    }


def mean_sizes(config: ModelConfig, name: str, lr: float, seeds: int, fault=None) -> Sizes:
    optim = OptimConfig(name=name, peak_lr=lr, eps=1e-8, weight_decay=0.0)
    scaling = fault and fault(scaling_of(config))
    of_seeds = [sizes(config, optim, seed, scaling) for seed in range(seeds)]
    return {key: statistics.fmean(found[key] for found in of_seeds) for key in of_seeds[0]}


def draw(file: Path, lr: float, seeds: int) -> None:
    """One panel for each parametrization: the size of each activation over the width, after 10 updates."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, parametrization in zip(axes, ("standard", "mup"), strict=True):
        by_width = {width: mean_sizes(shape(width, parametrization), "adamw", lr, seeds) for width in WIDTHS}
        for name in dict.fromkeys(name for name, _ in by_width[BASE]):
            axis.loglog(WIDTHS, [by_width[width][name, max(STEPS)] for width in WIDTHS], "o-", label=name, base=2)
        axis.set(title=f"parametrization: {parametrization}", xlabel="d_model", xticks=WIDTHS, xticklabels=WIDTHS)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean |activation| at step 10")
    axes[1].legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parametrization", default="mup", choices=("standard", "mup", "completep"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--lr", type=float, default=0.006)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="draw standard and mup beside each other")
    arguments = parser.parse_args()
    if arguments.output:
        return draw(arguments.output, arguments.lr, arguments.seeds)
    slopes = check(arguments.parametrization, arguments.optimizer, arguments.lr, arguments.seeds)
    for (name, step), slope in sorted(slopes.items(), key=lambda item: (item[0][1], item[0][0])):
        print(f"{name:8} step {step:2}  slope {slope:+.3f}")


if __name__ == "__main__":
    main()

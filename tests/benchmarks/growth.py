"""How costs grow: a step's time with sequence length, layers, micro-batch and processes; a save with the size of the model;
naming a batch with the size of the data.

    python tests/benchmarks/growth.py [--output growth.png]
    python tests/benchmarks/growth.py --table docs/benchmarks.md --output growth.png      draws a printed table again

Each step's time is the median of an `olmo-train bench` in a separate process. Prints a table and draws it, beside a line in
proportion to the work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = {"model.d_model": 256, "model.n_layers": 4, "model.n_heads": 4, "model.mlp_hidden": 704, "model.seq_len": 256,
        "model.vocab_size": 8192, "model.padded_vocab_size": 8192, "global_batch_size": 8, "micro_batch_size": 4}  # fmt: skip
STEP = {  # what grows: its values
    "model.seq_len": (64, 128, 256, 512, 1024, 2048),
    "model.n_layers": (2, 4, 8, 16),
    "micro_batch_size": (1, 2, 4, 8),
    "processes": (1, 2),
}
WORK_GROWS = ("model.seq_len", "model.n_layers", "parameters")  # with the others the work of a step stays the same
TITLES = {"step": "Seconds per step", "save": "Seconds per save", "naming a batch": "Seconds to name a batch"}
WIDTHS = (128, 256, 512, 1024)  # d_model of the models that are saved
INSTANCES = tuple(10**exponent for exponent in (4, 6, 8, 10))  # of the data out of which a batch of 2048 is named


def step_seconds(key: str, value: int, arguments: argparse.Namespace) -> float:
    changes = BASE if key == "processes" else BASE | {key: value}
    processes = value if key == "processes" else 1
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    words = [f"{name}={setting}" for name, setting in changes.items()] + ["parallel.compile=false", *arguments.word]
    steps = ["--steps", str(arguments.steps), "--warmup", "2", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(max(1, arguments.threads // processes))}
    out = subprocess.run(
        [sys.executable, *start, "-m", "olmo_train", "bench", *words, *steps], env=environment, capture_output=True, text=True
    )
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads(out.stdout)["step_seconds"]


def save_seconds(widths: tuple[int, ...]) -> dict[int, float]:
    """{parameters: seconds of a whole save, flushed}, the faster of two."""
    from checkpoints import build, timed

    from olmo_train import config as configuration
    from olmo_train.checkpoint.config import CheckpointConfig
    from olmo_train.checkpoint.save import Checkpointer
    from olmo_train.parallel.world import join_world
    from olmo_train.train_config import TrainConfig

    found = {}
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        for width in widths:
            shape = [f"model.d_model={width}", "model.n_layers=4", "model.n_heads=4", f"model.mlp_hidden={4 * width}"]
            config = configuration.load(TrainConfig, [], [f"run_dir={folder}", "data.sources.a.path=unused", *shape])
            model, optimizer = build(config, world)
            saver = Checkpointer(Path(folder, str(width)), CheckpointConfig(async_save=False, keep_last=1), world, {})
            seconds = [timed(lambda: saver.save(step, model, optimizer, {"data": {}})) for step in (1, 2)]  # noqa: B023
            found[sum(p.numel() for p in model.parameters())] = min(seconds)
    return found


def order_seconds(sizes: tuple[int, ...]) -> dict[int, float]:
    """{instances: seconds to name a batch of 2048 of them, deep in an epoch}."""
    import numpy as np
    from checkpoints import timed

    from olmo_train.data.order import PermutedOrder

    found = {}
    for size in sizes:
        order = PermutedOrder(["a", "b"], [size // 2, size // 2], [(1, [0.5, 0.5])], 1)
        first = np.arange(size // 3, size // 3 + 2048)
        found[size] = statistics.median(timed(lambda: order.at(first + 2048 * i)) for i in range(7))  # noqa: B023
    return found


def table(found: dict[str, dict[int, float]]) -> str:
    """A line for each thing that grows: its value and the seconds beside it."""
    lines = ["| what grows | value: seconds |", "|---|---|"]
    for key, points in found.items():
        lines.append(f"| {key} | " + ", ".join(f"{value:,}: {seconds:.3g}" for value, seconds in points.items()) + " |")
    return "\n".join(lines)


def read_table(text: str) -> dict[str, dict[int, float]]:
    """What `table` printed, alone or in a page."""
    rows = re.findall(r"^\| ((?:step|save|naming a batch): [^|]+) \| (.+) \|$", text, re.M)
    return {key: {int(v.replace(",", "")): float(s) for v, s in re.findall(r"([\d,]+): ([\d.]+)", line)} for key, line in rows}


def draw(found: dict[str, dict[int, float]], file: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from olmo_train.curves.figure import STYLE
    from olmo_train.curves.panels import COLORS, log_ticks
    from olmo_train.formats import short

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        panels = figure.subplots(2, -(-len(found) // 2)).flatten()
        for axes, (key, points) in zip(panels, found.items(), strict=False):
            what, _, grown = key.partition(": ")
            values, seconds = list(points), list(points.values())
            work = [seconds[-1] * (value / values[-1] if grown in WORK_GROWS else 1) for value in values]
            axes.loglog(values, work, linestyle="--", color="#6c757d", label="in proportion to work")
            axes.loglog(values, seconds, marker="o", markersize=3.5, color=COLORS[0], label="measured")
            axes.set_xticks(values, [f"{value:,}" if value < 10**4 else short(value) for value in values])
            low, high = min(*seconds, *work) / 2, max(*seconds, *work) * 2
            ticks = log_ticks(low, high)
            axes.set_yticks(ticks, [short(tick) for tick in ticks])
            axes.set_ylim(low, high)
            axes.minorticks_off()
            axes.set_title(TITLES[what], loc="left", fontweight="bold")
            axes.set_xlabel(grown)
        for axes in panels[len(found) :]:
            axes.remove()
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=2)
        figure.savefig(file, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="draw into this file")
    parser.add_argument("--table", type=Path, help="read the table in this file instead of measuring")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each point (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all processes together")
    parser.add_argument("--word", action="append", default=[], metavar="KEY=VALUE", help="a setting of all the steps")
    arguments = parser.parse_args()
    if arguments.table:
        return draw(read_table(arguments.table.read_text()), arguments.output)
    found = {f"step: {key}": {value: step_seconds(key, value, arguments) for value in values} for key, values in STEP.items()}
    found["save: parameters"] = save_seconds(WIDTHS)
    found["naming a batch: instances"] = order_seconds(INSTANCES)
    print(table(found))
    if arguments.output:
        draw(found, arguments.output)


if __name__ == "__main__":
    main()

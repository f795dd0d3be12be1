"""tell memory, time, energy and schedule before a launch

plan configs/models/olmo-1b.yaml --gpus 8 --gpu h100
plan configs/models/olmo-7b.yaml --gpus 64 --gpu h100 --price 2.5 --output schedule.png
plan CONFIG.yaml --gpu-memory 48 --gpu-peak 180 --gpu-power 300      a GPU that is not in the table
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train.commands.train import add_config_arguments, split_config
from olmo_train.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from olmo_train.data.mixture import Mixture
    from olmo_train.hardware import Hardware
    from olmo_train.recipe import TrainConfig

UNNAMED = "(not named)"
FORMATS = (".png", ".svg", ".pdf", ".html")
POINTS = 600  # of a drawn curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from olmo_train.planner import PAPER_CARBON, PAPER_PUE

    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the whole run (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="their kind, such as h100 or a100-80gb (default: this machine's)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of a GPU")
    parser.add_argument("--gpu-peak", type=float, metavar="TFLOPS", help="its dense bf16 peak, in 10^12 FLOP/s")
    parser.add_argument("--gpu-power", type=float, metavar="W", help="its power under load")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is assumed (default: 0.4)")
    parser.add_argument("--price", type=float, metavar="MONEY", help="of a GPU-hour")
    pue = f"the data centre's power over the GPUs' (default: {PAPER_PUE:g}, the OLMo paper's)"
    parser.add_argument("--pue", type=float, default=PAPER_PUE, help=pue)
    carbon = f"kgCO2eq of a kWh where it runs (default: {PAPER_CARBON:g}, the OLMo paper's)"
    parser.add_argument("--carbon", type=float, default=PAPER_CARBON, metavar="KG", help=carbon)
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the schedule: .png, .svg, .pdf or .html")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    config = load_config(arguments.config)
    gpu = choose_gpu(arguments)
    mixture, why_not = open_data(config)
    plan = make_plan(config, gpu, mixture, why_not, arguments)
    if arguments.json:
        print(json.dumps(plan, indent=1))
    else:
        show(plan, config)
    if arguments.output:
        draw(config, mixture, arguments.output)
        if not arguments.json:
            print(arguments.output)


def check_arguments(arguments: argparse.Namespace) -> None:
    for option in ("gpus", "gpu_memory", "gpu_peak", "gpu_power", "mfu", "price", "pue", "carbon"):
        value = getattr(arguments, option)
        if value is not None and not (value > 0 or (value == 0 and option in ("price", "carbon"))):
            raise ConfigError(f"--{option.replace('_', '-')}", f"must be above 0, got {value:g}")
    if arguments.mfu > 1:
        raise ConfigError("--mfu", f"is a share of the peak and at most 1, got {arguments.mfu:g}; 40% is 0.4")
    if arguments.pue < 1:
        raise ConfigError("--pue", f"is at least 1, got {arguments.pue:g}")
    if arguments.output and arguments.output.suffix not in FORMATS:
        raise ConfigError("--output", f"'{arguments.output.suffix}' is not a format; use {', '.join(FORMATS)}")


def load_config(words: list[str]) -> TrainConfig:
    """The configuration; a model's file alone is enough, since a plan needs neither run_dir nor data."""
    from olmo_train import config
    from olmo_train.recipe import TrainConfig

    values = config.read(*split_config(words))
    values.setdefault("run_dir", UNNAMED)
    values.setdefault("data", {"sources": {UNNAMED: {"path": UNNAMED}}})
    return config.build(TrainConfig, values)


def choose_gpu(arguments: argparse.Namespace) -> Hardware | None:
    """The named GPU's figures, or this machine's; what is given as an option goes before the table.

    None when no GPU is named and there is none here. Raises ConfigError when figures are missing.
    """
    from olmo_train.hardware import GPUS, Hardware, detect, lookup

    given = {
        "memory_gb": arguments.gpu_memory,
        "peak_flops": arguments.gpu_peak and arguments.gpu_peak * 1e12,
        "power_watts": arguments.gpu_power,
    }
    known = lookup(arguments.gpu) if arguments.gpu else None
    if known is None and arguments.gpu is None and not any(given.values()):
        return detect()
    figures = (asdict(known) if known else {}) | {key: value for key, value in given.items() if value}
    if len(figures) < len(given):
        name = (arguments.gpu or "").lower()
        kinds = [key for key in GPUS if name and key.startswith(name)]
        known_ones = f"one of {', '.join(kinds)}" if kinds else f"a known GPU: {nearest(name, GPUS)}"
        what = f"'{arguments.gpu}' has no figures here" if arguments.gpu else "only some figures are given"
        raise ConfigError("--gpu", f"{what}; give --gpu-memory, --gpu-peak and --gpu-power, or {known_ones}")
    return Hardware(**({"name": arguments.gpu or "a GPU of your figures"} | figures))


def open_data(config: TrainConfig) -> tuple[Mixture | None, str | None]:
    """The sources, opened, or why they could not be; a plan goes on without them."""
    from olmo_train.data.mixture import Mixture

    if UNNAMED in config.data.sources:
        return None, "no data are named"
    try:
        shape = config.model
        mixture = Mixture(config.data, config.seed, config.global_batch_size, shape.seq_len, shape.vocab_size)
        mixture.check_tokenizers()
        return mixture, None
    except DataError as problem:
        return None, str(problem)


def make_plan(
    config: TrainConfig, gpu: Hardware | None, mixture: Mixture | None, why_not: str | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The whole plan as plain data: what --json prints and what the tables show."""
    from olmo_train import planner, scaling
    from olmo_train.model.cost import FLOPS_CONVENTION, count_parameters, flops_per_token

    config.check_world(arguments.gpus)
    layout = layout_of(config, arguments.gpus)
    estimate = planner.memory_estimate(config.model, layout)
    count = count_parameters(config.model)
    tokens = config.steps * config.tokens_per_step
    plan = {
        "gpus": arguments.gpus,
        "gpu": gpu and asdict(gpu),
        "parameters": asdict(count) | {"total": count.total},
        "flops_per_token": flops_per_token(config.model),
        "flops_convention": FLOPS_CONVENTION,
        "layout": asdict(layout),
        "memory_bytes": estimate.moments,
        "memory_peak_bytes": estimate.peak,
        "memory_peak_moment": estimate.moment,
        "memory_runtime_bytes": planner.RUNTIME_BYTES,
        "state_bytes": planner.state_bytes(config.model, config.optim.name),
        "fits": None,
        "largest_micro_batch_size": None,
        "cost": None,
        "step": None,
        "assumptions": {"mfu": arguments.mfu, "price": arguments.price, "pue": arguments.pue, "carbon": arguments.carbon},
    }
    if gpu:
        cost = planner.run_cost(
            config.model, tokens, arguments.gpus, gpu, arguments.mfu, arguments.price, arguments.pue, arguments.carbon
        )
        plan |= {
            "fits": estimate.fits(gpu.memory_bytes),
            "largest_micro_batch_size": {
                checkpointing: planner.largest_micro_batch(
                    config.model, replace(layout, activation_checkpointing=checkpointing), gpu.memory_bytes
                )
                for checkpointing in planner.CHECKPOINTING
            },
            "cost": asdict(cost),
        }
    if gpu and gpu.name in scaling.LINKS:
        step = scaling.step_estimate(config.model, layout, gpu, scaling.LINKS[gpu.name], arguments.mfu)
        plan["step"] = asdict(step) | {"exposed_seconds": step.exposed_seconds}
    return plan | schedule(config, plan["cost"], mixture, why_not)


def layout_of(config: TrainConfig, gpus: int):
    from olmo_train.planner import Layout

    parallel = config.parallel
    return Layout(
        gpus=gpus,
        replicas=parallel.replicas,
        shard=parallel.shard,
        precision=parallel.precision,
        reduce_dtype=parallel.reduce_dtype,
        activation_checkpointing=parallel.activation_checkpointing,
        micro_batch_size=config.micro_batch_size,
        micro_batches=config.global_batch_size // (gpus * config.micro_batch_size),
        optimizer=config.optim.name,
    )


def schedule(config: TrainConfig, cost: dict | None, mixture: Mixture | None, why_not: str | None) -> dict[str, Any]:
    """Learning rate, tokens and time at milestones; epochs of each source; evaluations; checkpoints and their size."""
    from olmo_train import planner
    from olmo_train.optim import lr_at

    steps, every = config.steps, config.eval.interval_steps
    saved, kept = planner.checkpoint_counts(steps, config.checkpoint)
    bytes_each = planner.checkpoint_bytes(config.model, config.optim.name)
    weights = {name: source.weight for name, source in config.data.sources.items() if name != UNNAMED}
    visits = mixture and visits_before(mixture, steps * config.global_batch_size)
    return {
        "total_steps": steps,
        "warning": config.warmup_warning,
        "total_tokens": steps * config.tokens_per_step,
        "global_batch_size": config.global_batch_size,
        "tokens_per_step": config.tokens_per_step,
        "milestones": [
            {
                "step": step,
                "tokens": step * config.tokens_per_step,
                "lr": lr_at(step, config.optim, steps),
                "seconds": cost and cost["seconds"] * step / steps,
            }
            for step in planner.milestones(steps, config.optim.warmup_steps)
        ],
        "sources": {
            name: {
                "weight": weight,
                "tokens": mixture.sources[i].n_tokens if mixture else None,
                "instances": int(visits[i]) if mixture else None,
                "epochs": float(visits[i] / mixture.sizes[i]) if mixture else None,
            }
            for i, (name, weight) in enumerate(weights.items())
        },
        "sources_unknown": why_not,
        "evaluations": -(-steps // every) if config.data.validation or config.eval.downstream else 0,
        "checkpoints_saved": saved,
        "checkpoints_kept": kept,
        "checkpoint_bytes": bytes_each,
        "checkpoints_disk_bytes": (kept + 1) * bytes_each,  # one more while a new one is written
    }


def visits_before(mixture: Mixture, places: int) -> np.ndarray:
    """Visits of each source, (sources,) fp64; in proportion where a run has more places than an int64 can count."""
    most = 2**60
    return mixture.order.visits_before(min(places, most)) * max(1.0, places / most)


def show(plan: dict[str, Any], config: TrainConfig) -> None:
    """Print the plan as tables that fit 80 columns."""
    from olmo_train.console import rich_console

    console = rich_console(soft_wrap=False)
    gpu = plan["gpu"]
    kind = f"{plan['gpus']} x {gpu['name']}" if gpu else f"{plan['gpus']} GPU{'s' * (plan['gpus'] > 1)}, kind not named"
    console.print(f"{'' if config.run_dir == UNNAMED else config.run_dir + ': '}{kind}", style="bold")
    show_parameters(console, plan)
    show_memory(console, plan)
    show_cost(console, plan)
    show_schedule(console, plan)


def table(
    console: Console, title: str, columns: list[str], rows: list[list[str]], total: list[str] | None = None, text: tuple = (0,)
) -> None:
    """One table under its title; the columns of `text` are words, the others are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i in text else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    if total:
        made.add_row(*total, style="bold")
    console.print(f"\n{title}", style="bold")
    console.print(made)


def show_parameters(console: Console, plan: dict[str, Any]) -> None:
    counts = dict(plan["parameters"])
    total = counts.pop("total")
    if not counts["head"]:
        counts["head (tied to the embedding)"] = counts.pop("head")
    rows = [[name, f"{n:,}", f"{n / total:.1%}"] for name, n in counts.items()]
    table(console, "Parameters", ["part", "number", "share"], rows, ["total", f"{total:,}", ""])
    console.print(f"{plan['flops_per_token'] / 1e9:,.4g} GFLOPs a token: {plan['flops_convention']}")


def show_memory(console: Console, plan: dict[str, Any]) -> None:
    from rich.text import Text

    from olmo_train import planner

    moments, layout, gpu = plan["memory_bytes"], plan["layout"], plan["gpu"]
    small = plan["memory_peak_bytes"] < 1e9
    number = lambda count: f"{count / (1e6 if small else 1e9):,.2f}"  # noqa: E731
    rows = [[part, *(number(moment[part]) for moment in moments.values())] for part in next(iter(moments.values()))]
    total = ["total", *(number(sum(moment.values())) for moment in moments.values())]
    title = f"Memory of a GPU in {'MB' if small else 'GB'}"
    table(console, title, ["at the height of", *moments], rows, total)
    console.print(f"{layout['precision']}, {layout['micro_batches']:,} x {layout['micro_batch_size']} sequences a step, "
                  f"activation_checkpointing={layout['activation_checkpointing']}, without torch.compile.")  # fmt: skip
    shards = layout["gpus"] // layout["replicas"]
    each = f", {gigabytes(plan['state_bytes'] / shards)} on each of {shards} GPUs" if shards > 1 else ""
    a_parameter = plan["state_bytes"] / plan["parameters"]["total"]
    console.print(f"State, {a_parameter:.3g} bytes a parameter: {gigabytes(plan['state_bytes'])}{each}.")
    needed = plan["memory_peak_bytes"] + planner.RUNTIME_BYTES
    assumed = f"{gigabytes(planner.RUNTIME_BYTES)} of them assumed for the runtime"
    if not gpu:
        console.print(f"A GPU needs {gigabytes(needed)}, {assumed}; name one with --gpu to see whether it fits.")
        return
    verdict = ("Fits", "green") if plan["fits"] else ("Does not fit", "red")
    console.print(Text.assemble(verdict, f": {gigabytes(needed)} of {gpu['memory_gb']:g} GB, {assumed}."))
    share = layout["micro_batch_size"] * layout["micro_batches"]
    for checkpointing, largest in plan["largest_micro_batch_size"].items():
        fits = f"{largest} of a GPU's {share:,} sequences" if largest else "none, take more GPUs"
        console.print(f"Largest micro-batch with activation_checkpointing={checkpointing}: {fits}.")


def show_cost(console: Console, plan: dict[str, Any]) -> None:
    cost, assumed, gpu = plan["cost"], plan["assumptions"], plan["gpu"]
    if not cost:
        console.print("\nTime, energy and money are unknown without a GPU: name one with --gpu.")
        return
    peak = f"{gpu['peak_flops'] / 1e12:,.4g} bf16 TFLOP/s"
    money = f"{cost['money']:,.0f}" if cost["money"] is not None else "unknown"
    rows = [
        ["FLOPs", f"{cost['flops']:.3g}", f"{plan['total_tokens']:.4g} tokens"],
        ["tokens/s", f"{cost['tokens_per_second']:,.0f}", f"assumed MFU {assumed['mfu']:.0%} of {peak} (--mfu)"],
        ["time", duration(cost["seconds"]), "without evaluation, saving, restarts"],
        ["GPU-hours", f"{cost['gpu_hours']:,.{0 if cost['gpu_hours'] >= 100 else 2}f}", f"{plan['gpus']} GPUs"],
        ["money", money, f"{assumed['price']:g} a GPU-hour" if assumed["price"] is not None else "give --price of a GPU-hour"],
        ["energy", energy(cost["kwh"]), f"{gpu['power_watts']:g} W a GPU x PUE {assumed['pue']:g} (--pue)"],
        ["CO2eq", mass(cost["co2_kg"]), f"{assumed['carbon']:g} kg a kWh (--carbon)"],
    ]
    table(console, "Cost", ["", "amount", "from"], rows, text=(0, 2))
    if step := plan["step"]:
        waiting = step["exposed_seconds"] / step["seconds"]
        console.print(
            f"The table is of computing alone. With {plan['layout']['gpus']} GPUs' communication a step takes "
            f"{duration(step['seconds'])}, {waiting:.1%} of it waiting: MFU {step['mfu']:.1%}, "
            f"{step['tokens_per_second']:,.0f} tokens/s."
        )
    if plan["layout"]["precision"] != "bf16":
        console.print("The peak is that of bf16, and this run computes in fp32: it will take several times as long.")


def show_schedule(console: Console, plan: dict[str, Any]) -> None:
    rows = [
        [f"{m['step']:,}", f"{m['tokens']:.3e}", f"{m['lr']:.3e}", duration(m["seconds"]) if m["seconds"] else "-"]
        for m in plan["milestones"]
    ]
    title = f"Schedule: {plan['global_batch_size']:,} sequences, {plan['tokens_per_step']:,} tokens a step"
    table(console, title, ["step", "tokens", "learning rate", "after"], rows)
    if plan["sources"]:
        rows = [
            [
                name,
                f"{s['weight']:g}",
                f"{s['tokens']:,}" if s["tokens"] else "unknown",
                f"{s['epochs']:.3g}" if s["tokens"] else "unknown",
            ]
            for name, s in plan["sources"].items()
        ]
        table(console, "Sources", ["name", "weight", "tokens", "epochs"], rows)
    if plan["sources_unknown"]:
        console.print(f"Epochs are unknown: {plan['sources_unknown']}")
    missing = "" if plan["evaluations"] else ", neither data.validation nor eval.downstream is set"
    console.print(f"Evaluations: {plan['evaluations']:,}{missing}.")
    if plan["warning"]:
        console.print(f"Warning: {plan['warning']}")
    console.print(f"Checkpoints: {plan['checkpoints_saved']:,} saved, {plan['checkpoints_kept']:,} kept, "
                  f"{gigabytes(plan['checkpoint_bytes'])} each; at most "
                  f"{gigabytes(plan['checkpoints_disk_bytes'])} of disk.")  # fmt: skip


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def energy(kwh: float) -> str:
    return f"{kwh / 1000:,.4g} MWh" if kwh >= 1000 else f"{kwh:.3g} kWh"


def mass(kg: float) -> str:
    return f"{kg / 1000:,.3g} t" if kg >= 1000 else f"{kg:.3g} kg"


def draw(config: TrainConfig, mixture: Mixture | None, file: Path) -> None:
    """Draw learning rate and epochs over tokens: a page that opens without a network, or a figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    panels = curves(config, mixture)
    if file.suffix == ".html":
        from plotly.subplots import make_subplots

        page = make_subplots(rows=len(panels), cols=1, shared_xaxes=True)
        for row, (label, lines) in enumerate(panels.items(), start=1):
            for name, (x, y) in lines.items():
                page.add_scatter(x=x, y=y, name=name, row=row, col=1)
            page.update_yaxes(title_text=label, rangemode="tozero", row=row, col=1)
        page.update_xaxes(title_text="tokens", row=len(panels), col=1)
        page.update_layout(title=f"Schedule of {config.steps:,} steps", template="plotly_white")
        page.write_html(file)
        return
    from matplotlib.figure import Figure

    from olmo_train.curves.figure import plain

    figure = Figure(figsize=(7, 2.6 * len(panels)), layout="constrained")
    for axes, (label, lines) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels.items(), strict=True):
        for name, (x, y) in lines.items():
            axes.plot(x, y, label=plain(name))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(frameon=False)
    axes.set_xlabel("tokens")
    figure.savefig(file, dpi=150)


def curves(config: TrainConfig, mixture: Mixture | None) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """{panel: {line: (tokens, values)}}."""
    from olmo_train.optim import lr_at

    steps = sorted({1, config.optim.warmup_steps, *(max(1, config.steps * i // POINTS) for i in range(POINTS + 1))})
    steps = [step for step in steps if 1 <= step <= config.steps]
    tokens = [float(step * config.tokens_per_step) for step in steps]
    panels = {"learning rate": {"learning rate": (tokens, [lr_at(step, config.optim, config.steps) for step in steps])}}
    if mixture:
        visits = [visits_before(mixture, step * config.global_batch_size) for step in steps]
        panels["epochs"] = {
            name: (tokens, [float(v[i] / mixture.sizes[i]) for v in visits]) for i, name in enumerate(mixture.names)
        }
    return panels

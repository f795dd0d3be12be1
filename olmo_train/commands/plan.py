"""estimate memory, time, energy and schedule before a launch

plan configs/models/olmo-1b.yaml --gpus 8 --gpu h100
plan configs/models/olmo-7b.yaml --gpus 64 --gpu h100 --price 2.5 --output schedule.png
plan CONFIG.yaml --gpu-memory 48 --gpu-peak 180 --gpu-power 300      a GPU that is not in the table
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train.commands.common import add_config_arguments, load_config, print_table
from olmo_train.curves.schedule import draw
from olmo_train.curves.write import check_format
from olmo_train.errors import ConfigError
from olmo_train.formats import amount, byte_size, counted, duration, extent, rounded
from olmo_train.parallel.choices import decide, with_parallel
from olmo_train.plan.plan import UNNAMED, choose_gpu, make_plan, open_data, with_length
from olmo_train.plan.preflight import does_not_fit, memory_of
from olmo_train.plan.time import PAPER_CARBON, PAPER_PUE, Assumptions

if TYPE_CHECKING:
    from rich.console import Console

    from olmo_train.hardware import Hardware
    from olmo_train.train_config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="the GPU, such as h100 or a100-80gb (default: this machine's)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of a GPU")
    parser.add_argument("--gpu-peak", type=float, metavar="TFLOPS", help="its dense bf16 peak, in 10^12 FLOP/s")
    parser.add_argument("--gpu-power", type=float, metavar="W", help="its power under load")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed fraction of the peak (default: 0.4)")
    parser.add_argument("--price", type=float, metavar="MONEY", help="price of a GPU-hour")
    pue = f"the data centre's power over the GPUs' (default: {PAPER_PUE:g}, the OLMo paper's)"
    parser.add_argument("--pue", type=float, default=PAPER_PUE, help=pue)
    carbon = f"kgCO2eq of a kWh where it runs (default: {PAPER_CARBON:g}, the OLMo paper's)"
    parser.add_argument("--carbon", type=float, default=PAPER_CARBON, metavar="KG", help=carbon)
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the schedule: .png, .svg, .pdf or .html")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    config = load_config(arguments.config)
    gpu = choose_gpu(arguments.gpu, arguments.gpu_memory, arguments.gpu_peak, arguments.gpu_power)
    mixture, why_not = open_data(config)
    config, decisions = decided(with_length(config, mixture, why_not), gpu)
    assumed = Assumptions(arguments.mfu, arguments.price, arguments.pue, arguments.carbon)
    config.check_world(arguments.gpus)
    found = memory_of(config, arguments.gpus, arguments.gpus, gpu and gpu.memory_bytes)
    plan = make_plan(config, arguments.gpus, gpu, mixture, why_not, found, assumed, None if gpu else cpu_seconds)
    plan["decisions"] = decisions
    if arguments.json:
        print(json.dumps(plan, indent=1))
    else:
        show(plan, config)
    if arguments.output:
        draw(config, mixture, arguments.output)
        if not arguments.json:
            print(arguments.output)
    if found.fits is False:
        raise does_not_fit(found, config)


def decided(config: TrainConfig, gpu: Hardware | None) -> tuple[TrainConfig, list[str]]:
    """The configuration with what a run on this GPU, or else on this machine's CPU, would choose for `parallel`, and lines about
    that."""
    if gpu:  # each has bf16, in which its peak is quoted
        precision = "bf16" if config.parallel.precision == "auto" else config.parallel.precision
        return with_parallel(config, replace(config.parallel, precision=precision)), []
    import torch

    from olmo_train.parallel.kernels import missing_for_compile

    missing = functools.partial(missing_for_compile, on_gpu=False)
    return decide(config, False, torch.get_num_threads(), missing, lambda lasting: lasting)


def cpu_seconds(config: TrainConfig) -> tuple[float, float]:
    """Seconds of a step on this machine's CPU, and the slowdown by other programs. Imports torch, which a plan for
    GPUs does not need."""
    from olmo_train.tools.cpu_time import step_seconds

    return step_seconds(config)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a figure that is out of its range, or a file that cannot be drawn."""
    for option in ("gpus", "gpu_memory", "gpu_peak", "gpu_power", "mfu", "price", "pue", "carbon"):
        value = getattr(arguments, option)
        if value is not None and not (value > 0 or (value == 0 and option in ("price", "carbon"))):
            raise ConfigError(f"--{option.replace('_', '-')}", f"must be above 0, got {value:g}")
    if arguments.mfu > 1:
        raise ConfigError("--mfu", f"is a share of the peak and at most 1, got {arguments.mfu:g}; 40% is 0.4")
    if arguments.pue < 1:
        raise ConfigError("--pue", f"is at least 1, got {arguments.pue:g}")
    if arguments.output:
        check_format(arguments.output)


def show(plan: dict[str, Any], config: TrainConfig) -> None:
    """Print the plan as tables that fit 80 columns."""
    from olmo_train.log.console import rich_console

    console = rich_console(soft_wrap=False)
    gpu, count = plan["gpu"], plan["gpus"]
    kind = f"{count} x {gpu['name']}" if gpu else f"{counted(count, 'process')} on this machine's CPU"
    console.print(f"{'' if config.run_dir == UNNAMED else config.run_dir + ': '}{kind}", style="bold")
    show_verdict(console, plan)
    show_run(console, plan, config)
    show_parameters(console, plan)
    show_memory(console, plan)
    show_cost(console, plan)
    show_schedule(console, plan)


def show_verdict(console: Console, plan: dict[str, Any]) -> None:
    """Whether the run fits, first of all."""
    from rich.text import Text

    from olmo_train.plan import memory

    gpu, machine = plan["gpu"], plan["machine"]
    if gpu:
        needed = byte_size(plan["memory_peak_bytes"] + memory.RUNTIME_BYTES)
        where = f"{needed} of {gpu['memory_gb']:g} GB, {byte_size(memory.RUNTIME_BYTES)} of them assumed for the runtime"
        fits = plan["fits"]
    else:
        available, fits = machine["memory_available_bytes"], machine["fits"]
        beside = "" if available is None else f" of {byte_size(available)} available"
        where = f"{byte_size(machine['memory_needed_bytes'])}{beside} on this machine"
    verdict = {True: ("Fits", "green"), False: ("Does not fit", "red"), None: ("Needs", "")}[fits]
    console.print(Text.assemble(verdict, f": {where}."))


def show_run(console: Console, plan: dict[str, Any], config: TrainConfig) -> None:
    """The figures that most readers want, in one table."""
    machine, cost, warmup = plan["machine"], plan["cost"], config.optim.warmup_steps
    epochs = [f"{name} {source['epochs']:.3g}" for name, source in plan["sources"].items() if source["epochs"] is not None]
    rows = [
        ["parameters", f"{plan['parameters']['total']:,}"],
        ["steps", f"{plan['total_steps']:,}"],
        ["tokens per step", ", ".join(batch_of(plan))],
        ["tokens", f"{plan['total_tokens']:.4g}"],
        ["epochs", ", ".join(epochs) or "unknown"],
        ["warmup", f"{counted(warmup, 'step')}, {100 * warmup / plan['total_steps']:.3g}% of the run"],
    ]
    if machine and machine["step_seconds"]:
        rows.append(["time", f"about {duration(machine['seconds'])}, {duration(machine['step_seconds'])} per step"])
    elif cost:
        rows.append(["time", f"about {duration(cost['seconds'])}"])
    console.print()
    print_table(["Run", ""], rows, left=["Run", ""])
    if machine and machine["step_seconds"]:
        console.print("Time: from one and two blocks timed on this machine, without evaluation, saving and other programs.")
        if machine["slowdown"] > 1:
            now = duration(rounded(machine["seconds"] * machine["slowdown"]))
            console.print(f"This machine is busy: beside its other programs the run takes about {now}. "
                          "For a better estimate, repeat this when they have ended.")  # fmt: skip
    for decision in plan["decisions"]:
        console.print(f"{decision[0].upper()}{decision[1:]}.")
    for warning in plan["warnings"]:
        console.print(f"Warning: {warning}")


def batch_of(plan: dict[str, Any]) -> tuple[str, str]:
    """The tokens and the sequences of a step, from the smallest to the largest global batch."""
    sizes = [size for _, size in plan["batches"]]
    return extent(plan["seq_len"] * size for size in sizes), extent(sizes, "sequence")


def show_parameters(console: Console, plan: dict[str, Any]) -> None:
    """The parameters by part of the model, and FLOPs a token."""
    counts = dict(plan["parameters"])
    total = counts.pop("total")
    if not counts["head"]:
        counts["head (tied to the embedding)"] = counts.pop("head")
    rows = [[name, f"{n:,}", f"{n / total:.1%}"] for name, n in counts.items()]
    print_table(["part", "number", "share"], rows, title="Parameters", total=["total", f"{total:,}", ""])
    console.print(f"{plan['flops_per_token'] / 1e9:,.4g} GFLOPs a token: {plan['flops_convention']}")


def show_memory(console: Console, plan: dict[str, Any]) -> None:
    """Memory by part at the peaks of a step, the state, and the largest micro-batches that fit."""
    moments, layout, gpu = plan["memory_bytes"], plan["layout"], plan["gpu"]
    small = plan["memory_peak_bytes"] < 1e9
    number = lambda count: f"{count / (1e6 if small else 1e9):,.2f}"  # noqa: E731
    rows = [[part, *(number(moment[part]) for moment in moments.values())] for part in next(iter(moments.values()))]
    total = ["total", *(number(sum(moment.values())) for moment in moments.values())]
    title = f"Memory of a {'GPU' if gpu else 'process'} in {'MB' if small else 'GB'}, at its three peaks"
    print_table(["", *moments], rows, title=title, total=total)
    console.print(f"{layout['precision']}, {layout['micro_batches']:,} x "
                  f"{counted(layout['micro_batch_size'], 'sequence')} a step, "
                  f"activation_checkpointing={layout['activation_checkpointing']}, without torch.compile"
                  f"{', with which the run takes less' if plan['compiled'] else ''}.")  # fmt: skip
    shards = layout["gpus"] // layout["replicas"]
    each = f", {byte_size(plan['state_bytes'] / shards)} on each of {counted(shards, 'GPU')}" if shards > 1 else ""
    a_parameter = plan["state_bytes"] / plan["parameters"]["total"]
    console.print(f"State, {a_parameter:.3g} bytes a parameter: {byte_size(plan['state_bytes'])}{each}.")
    if not gpu:
        return
    share = layout["micro_batch_size"] * layout["micro_batches"]
    for checkpointing, largest in plan["largest_micro_batch_size"].items():
        fits = f"{largest} of a GPU's {counted(share, 'sequence')}" if largest else "none, take more GPUs"
        console.print(f"Largest micro-batch with activation_checkpointing={checkpointing}: {fits}.")


def show_cost(console: Console, plan: dict[str, Any]) -> None:
    """Time, money, energy and CO2 on GPUs, and the same run on more of them."""
    cost, assumed, gpu = plan["cost"], plan["assumptions"], plan["gpu"]
    if not cost:
        console.print("\nEnergy and money are unknown without a GPU; to plan for one: --gpu h100.")
        return
    peak = f"{gpu['peak_flops'] / 1e12:,.4g} bf16 TFLOP/s"
    money = f"{cost['money']:,.0f}" if cost["money"] is not None else "unknown"
    rows = [
        ["FLOPs", f"{cost['flops']:.3g}", f"{plan['total_tokens']:.4g} tokens"],
        ["tokens/s", f"{cost['tokens_per_second']:,.0f}", f"assumed MFU {assumed['mfu']:.0%} of {peak} (--mfu)"],
        ["time", duration(cost["seconds"]), "without evaluation, saving, restarts"],
        ["GPU-hours", f"{cost['gpu_hours']:,.{0 if cost['gpu_hours'] >= 100 else 2}f}", counted(plan["gpus"], "GPU")],
        ["money", money, f"{assumed['price']:g} a GPU-hour" if assumed["price"] is not None else "set --price, of a GPU-hour"],
        ["energy", amount(cost["kwh"], "kWh", "MWh"), f"{gpu['power_watts']:g} W a GPU x PUE {assumed['pue']:g} (--pue)"],
        ["CO2eq", amount(cost["co2_kg"], "kg", "t"), f"{assumed['carbon']:g} kg a kWh (--carbon)"],
    ]
    if updates := plan["update_flops"] * plan["total_steps"]:
        rows.insert(1, ["Muon's FLOPs", f"{updates:.3g}", "orthogonalization, on each GPU"])
    print_table(["", "amount", "from"], rows, left=["", "from"], title="Cost")
    if step := plan["step"]:
        waiting = step["exposed_seconds"] / step["seconds"]
        console.print(
            f"The table leaves out communication. With that of {counted(plan['gpus'], 'GPU')} a step "
            f"takes {duration(step['seconds'])}, {waiting:.1%} of it waiting: MFU {step['mfu']:.1%}, "
            f"{step['tokens_per_second']:,.0f} tokens/s."
        )
    if len(plan["scaling"]) > 1:
        show_scaling(console, plan)
    if plan["layout"]["precision"] != "bf16":
        console.print("The peak is that of bf16, and this run computes in fp32: it will take several times as long.")


def show_scaling(console: Console, plan: dict[str, Any]) -> None:
    """The same run on more GPUs, see docs/scaling.md."""

    def cells(step: dict[str, Any]) -> list[str]:
        return [duration(step["seconds"]), f"{step['exposed_seconds'] / step['seconds']:.1%}", f"{step['mfu']:.1%}"]

    rows = []
    for row in plan["scaling"]:
        best = row["best"]
        rows.append([f"{row['gpus']:,}", *cells(row), *([f"{best['replicas']:,}", *cells(best)] if best else "----")])
    one = ("step", "waiting", "MFU")
    title = "More GPUs: as configured, and with the fastest number of replicas that fits"
    print_table(["GPUs", *one, "replicas", *one], rows, left=(), title=title)


def show_schedule(console: Console, plan: dict[str, Any]) -> None:
    """The learning rate over the run, the sources, and the number of evaluations and checkpoints."""
    rows = [
        [f"{m['step']:,}", f"{m['tokens']:.3e}", f"{m['lr']:.3e}", duration(m["seconds"]) if m["seconds"] else "-"]
        for m in plan["milestones"]
    ]
    tokens, sequences = batch_of(plan)
    title = f"Schedule: {sequences}, {tokens} tokens a step"
    print_table(["step", "tokens", "learning rate", "after"], rows, title=title)
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
        print_table(["name", "weight", "tokens", "epochs"], rows, title="Sources")
    if plan["sources_unknown"]:
        console.print(f"Epochs are unknown: {plan['sources_unknown']}")
    missing = "" if plan["evaluations"] else ", neither data.validation nor eval.downstream is set"
    console.print(f"Evaluations: {plan['evaluations']:,}{missing}.")
    console.print(f"Checkpoints: {plan['checkpoints_saved']:,} saved, {plan['checkpoints_kept']:,} kept, "
                  f"{byte_size(plan['checkpoint_bytes'])} each; at most "
                  f"{byte_size(plan['checkpoints_disk_bytes'])} of disk.")  # fmt: skip

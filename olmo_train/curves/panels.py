"""What is drawn where: panels of metrics that share a unit, x axes, marked events, and colours.

PANELS is the table to extend. A metric goes to the first panel with a pattern that matches, and is called there by the part of
its name that the pattern's `*` covers. A metric that matches none gets a separate panel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from olmo_train.curves.runs import BOOKKEEPING, Run, Series
from olmo_train.errors import ConfigError, did_you_mean, nearest
from olmo_train.formats import short


@dataclass(frozen=True)
class Axis:
    """An x axis; `source` returns its value at each logged step of a run, in units of `unit`."""

    name: str
    label: str
    metric: str | None = None  # that holds it
    unit: float = 1

    def source(self, run: Run) -> Series | None:
        """The axis as a function of the step, 0 at step 0; None when the run has not logged it."""
        source = run.elapsed if self.name == "time" else run.series.get(self.metric)
        if source is None:
            return None
        finite = np.isfinite(source.values)
        steps, values = source.steps[finite], source.values[finite] / self.unit
        if steps[0] > 0:
            steps, values = np.append(0, steps), np.append(0.0, values)
        return Series(steps, values)

    def at(self, run: Run, steps: np.ndarray) -> np.ndarray | None:
        """The steps on this axis, or None when the run has not logged it."""
        if self.name == "step":
            return steps.astype(np.float64)
        source = self.source(run)
        return None if source is None else np.interp(steps, source.steps, source.values)


def axes(runs: list[Run]) -> dict[str, Axis]:
    """{name: x axis} of those on which any of the runs can be drawn. The longest run decides the unit of time."""
    longest = max((run.elapsed.values.max() for run in runs if run.elapsed), default=0)
    word, unit = ("minutes", 60) if longest < 2 * 3600 else ("hours", 3600) if longest < 4 * 86400 else ("days", 86400)
    known = (
        Axis("step", "step"),
        Axis("tokens", "tokens", "throughput/total_tokens"),
        Axis("flops", "training FLOPs", "throughput/total_flops"),
        Axis("time", f"{word} of training", unit=unit),
    )
    return {axis.name: axis for axis in known if axis.name == "step" or any(axis.source(run) is not None for run in runs)}


def axis_of(runs: list[Run], name: str) -> Axis:
    """Raises ConfigError when no run has values for this axis."""
    known = axes(runs)
    if name not in known:
        raise ConfigError("--x", f"no run has logged its {name}; known here: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class View:
    """How curves are drawn; of the page, its first view."""

    axis: Axis
    log_x: bool = False
    smooth: float = 0  # average over about this many steps to each side; 0: not at all


# Okabe and Ito's colours, which people of every colour vision can tell apart, black and yellow left out: on a light
# ground, and made lighter for a dark one.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#6C757D")
DARK_COLORS = ("#56A8E8", "#FF8B4D", "#2FC79B", "#E89AC7", "#F2B544", "#9AD7FF", "#C69A7A", "#A8B0B8")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Mark:
    """How an event is marked above a plot: the same shape and colour on the page, in a figure and in the terminal."""

    glyph: str
    plotly: str  # plotly's and matplotlib's names of the shape
    matplotlib: str
    color: str
    dark_color: str
    terminal_color: str
    shown: bool = True  # at first, on the page


EVENTS = {
    "spike": Mark("▼", "triangle-down", "v", "#C1121F", "#FF6B6B", "red+"),
    "skip": Mark("✕", "x", "X", "#B35900", "#FFA94D", "orange"),
    "rewind": Mark("◀", "triangle-left", "<", "#7B3294", "#C58BE0", "magenta+"),
    "resume": Mark("▶", "triangle-right", ">", "#495057", "#CED4DA", "white"),
    "branch": Mark("◆", "diamond", "D", "#495057", "#CED4DA", "white"),
    "save": Mark("▪", "square", "s", "#2B8A3E", "#69DB7C", "green"),
    "signal": Mark("●", "circle", "o", "#495057", "#CED4DA", "white", shown=False),
}
MOST_MARKS = 60  # of one kind and run in a figure or the terminal; more would be a bar


def marks(runs: list[Run]) -> list[tuple[int, str, np.ndarray]]:
    """(index of the run, event, its steps) of what a figure or the terminal marks, rare events last, over frequent ones. Saves
    are marked for a single run only, and no kind where it is too many."""
    found = []
    for kind, mark in reversed(EVENTS.items()):
        for i, run in enumerate(runs if mark.shown and (kind != "save" or len(runs) == 1) else ()):
            steps = np.unique([event["step"] for event in run.events if event["event"] == kind and event["step"] > 0])
            if 0 < len(steps) <= MOST_MARKS:
                found.append((i, kind, steps))
    return found


def marked_kinds(runs: list[Run]) -> list[str]:
    """The events that are marked, which a legend explains."""
    found = {kind for _, kind, _ in marks(runs)}
    return [kind for kind in EVENTS if kind in found]


def hues(runs: list[Run]) -> tuple[list[str], list[int]]:
    """The names of the hues, and which of them each run has.

    Up to eight runs have one each. More share the hue of their group: `log.wandb.group`, or the first configuration key that
    has two to eight values.
    """
    if len(runs) <= len(COLORS):
        return [run.name for run in runs], list(range(len(runs)))
    keys = sorted({key for run in runs for key in run.config if key != "run_dir" and not key.startswith("log.")})
    for key in ("log.wandb.group", *keys):
        values = [str(run.config.get(key, "–")) for run in runs]
        found = list(dict.fromkeys(values))
        if 2 <= len(found) <= len(COLORS):
            return [f"{key.rpartition('.')[2]} {value}" for value in found], [found.index(value) for value in values]
    return [f"{len(runs)} runs"], [0] * len(runs)


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str  # label of the y axis
    patterns: dict[str, str]  # metric pattern: name of its curves; `*` in both is the same text
    log: bool = False  # y axis
    smooth: bool = True  # whether it can be smoothed; a schedule has no noise
    limit: str | None = None  # dotted configuration key of a value that is drawn as a horizontal line
    limit_name: str = ""
    section: str = "Other metrics"  # of the page

    @property
    def shown_unit(self) -> str:
        """The unit beside the title, unless it repeats the title."""
        return "" if self.unit == self.title.lower() else self.unit


SECTIONS = ("Loss", "Optimization", "Data", "Other metrics", "Throughput", "System")
FOLDED = ("Throughput", "System")  # of no interest while all is well
PANELS = (
    Panel("Loss", "nats per token", {"train/CrossEntropyLoss": "training", "eval/*/CrossEntropyLoss": "validation *"},
          section="Loss"),
    Panel("Loss by source", "nats per token", {"train/source/*/CrossEntropyLoss": "*"}, section="Loss"),
    Panel("Bits per byte", "bits per byte", {"train/BitsPerByte": "training", "train/source/*/BitsPerByte": "*",
                                             "eval/*/BitsPerByte": "validation *"}, section="Loss"),
    Panel("Gradient norm", "L2 norm", {"optim/total_grad_norm": "gradient norm"}, log=True,
          limit="optim.max_grad_norm", limit_name="clip", section="Optimization"),
    Panel("Learning rate", "learning rate", {"optim/learning_rate_group0": "learning rate"}, smooth=False,
          section="Optimization"),
    Panel("Throughput", "tokens per second", {"throughput/tokens_per_second": "all devices"}, section="Throughput"),
    Panel("Throughput per device", "tokens per second", {"throughput/device/tokens_per_second": "per device"},
          section="Throughput"),
    Panel("Model FLOPs utilization", "share of peak", {"throughput/mfu": "MFU"}, section="Throughput"),
    Panel("Seconds per step", "seconds", {"throughput/step_seconds": "step", "throughput/data_wait_seconds": "waiting for data"},
          section="Throughput"),
    Panel("Downstream accuracy", "accuracy", {"eval/downstream/*_acc": "*",
                                              "eval/downstream/*_len_norm": "* (length-normalized)"}, section="Loss"),
    Panel("Downstream bits per byte", "bits per byte", {"eval/downstream/*_bpb": "*"}, section="Loss"),
    Panel("Epochs", "times read", {"train/source/*/epoch": "*"}, smooth=False, section="Data"),
    Panel("Clipped steps", "share of steps", {"optim/clipping_rate": "clipped"}, section="Optimization"),
    Panel("Peak memory", "MB", {"System/Peak GPU Memory (MB)": "peak memory"}, section="System"),
    Panel("Energy", "kWh", {"throughput/energy_kwh": "GPUs"}, smooth=False, section="System"),
    Panel("Saving", "seconds", {"throughput/checkpoint_stall_seconds": "training waits",
                                "throughput/checkpoint_write_seconds": "writing"}, smooth=False, section="System"),
    Panel("Saving speed", "bytes per second", {"throughput/checkpoint_bytes_per_second": "writing"}, smooth=False,
          section="System"),
)  # fmt: skip
PREFIXES = {"eval": "Loss", "optim": "Optimization", "throughput": "Throughput", "System": "System"}  # of other metrics

# In another panel already, an x axis, or a mark: drawn only when --metric asks for them.
REDUNDANT = ("*/Perplexity", "throughput/total_*", "optim/learning_rate_group[1-9]*", "skipped", "spike", *BOOKKEEPING)


# What other tools call a metric.
OTHER_NAMES = {
    "train/CrossEntropyLoss": ("loss", "train_loss", "training_loss", "ce", "ce_loss", "nll", "nll_loss", "lm_loss"),
    "eval/*/CrossEntropyLoss": ("val", "val_loss", "valid_loss", "validation_loss", "eval_loss", "test_loss", "validation"),
    "train/Perplexity": ("ppl", "perplexity", "train_ppl", "train_perplexity"),
    "eval/*/Perplexity": ("val_ppl", "eval_ppl", "val_perplexity", "eval_perplexity"),
    "optim/learning_rate_group0": ("lr", "learning_rate", "train_lr", "train_learning_rate"),
    "optim/total_grad_norm": ("grad_norm", "gnorm", "gradient_norm", "global_norm", "norm", "train_grad_norm"),
    "throughput/tokens_per_second": ("throughput", "speed", "tps", "tok_s", "tokens_s", "tokens_sec", "tokens_per_sec", "wps"),
    "throughput/step_seconds": ("step_time", "iter_time", "iteration_time", "seconds", "sec_per_step", "time_per_step"),
    "System/Peak GPU Memory (MB)": ("memory", "mem", "gpu_memory", "peak_memory", "max_memory"),
    "eval/downstream/*_acc": ("acc", "accuracy"),
    "train/source/*/epoch": ("epoch", "epochs"),
}  # fmt: skip


@dataclass(frozen=True)
class Curves:
    """The metrics of these runs in one panel."""

    panel: Panel
    metrics: dict[str, str]  # {metric: name of the curve}


def choose(runs: list[Run], patterns: list[str] = ()) -> list[Curves]:
    """The panels of these runs: of every metric, or of those that match `patterns` (names, or with * ? [...]). Without
    patterns, a metric that repeats one of another panel is left out: throughput per device with one device, the loss of a
    single source.

    Raises ConfigError when a pattern matches no metric of any run.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.series))
    wanted = [name for name in known if not any(fnmatchcase(name, pattern) for pattern in REDUNDANT)]
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ConfigError("--metric", f"no run has the metric '{pattern}'; {_nearest_metric(pattern, known)}")
        wanted = [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]
    found: dict[str, Curves] = {}
    for name in dict.fromkeys(wanted):
        panel, label = place(name)
        others = [m for c in found.values() if c.panel is not panel and c.panel.unit == panel.unit for m in c.metrics]
        if panel.unit and not patterns and any(_equal(runs, name, other) for other in others):
            continue
        found.setdefault(panel.title, Curves(panel, {})).metrics[name] = label
    rank = {panel.title: i for i, panel in enumerate(PANELS)}
    return sorted(found.values(), key=lambda curves: rank.get(curves.panel.title, len(PANELS)))


def _nearest_metric(word: str, known: list[str]) -> str:
    """`did you mean 'train/CrossEntropyLoss'?`, by what other tools call it, else by its spelling."""
    plain = re.sub(r"\W+", "_", word.lower()).removeprefix("optim_").removeprefix("throughput_")
    for pattern, words in OTHER_NAMES.items():
        if plain in words and (names := [name for name in known if fnmatchcase(name, pattern)]):
            return did_you_mean(names[:3])
    return nearest(word, set(known) - set(BOOKKEEPING))


def _equal(runs: list[Run], first: str, second: str) -> bool:
    """Whether two metrics have the same values in all runs."""
    for run in runs:
        a, b = run.series.get(first), run.series.get(second)
        if (a is None) != (b is None):
            return False
        if a and b and not (np.array_equal(a.steps, b.steps) and np.allclose(a.values, b.values, rtol=1e-9, equal_nan=True)):
            return False
    return True


def place(metric: str) -> tuple[Panel, str]:
    """The panel of a metric and the name of its curve there."""
    for panel in PANELS:
        for pattern, name in panel.patterns.items():
            if fnmatchcase(metric, pattern):
                before, star, after = pattern.partition("*")
                covered = metric[len(before) : len(metric) - len(after)] if star else ""
                return panel, name.replace("*", covered)
    return Panel(metric, "", {metric: metric}, section=PREFIXES.get(metric.partition("/")[0], "Other metrics")), metric


def legend_names(runs: list[Run], curves: Curves) -> dict[tuple[int, str], str]:
    """{(run index, metric): name of the curve in a legend}: the curve, the run's hue, or both where both are needed."""
    names, of_run = hues(runs)
    found = {(i, m): name for m, name in curves.metrics.items() for i, run in enumerate(runs) if m in run.series}
    if len(runs) == 1:
        return found
    one_curve = len(set(found.values())) == 1
    return {(i, m): names[of_run[i]] if one_curve else f"{names[of_run[i]]}, {name}" for (i, m), name in found.items()}


def is_evaluation(metric: str) -> bool:
    """Evaluations are few: they are drawn with their points and never smoothed."""
    return metric.startswith("eval/")


def may_smooth(panel: Panel, metric: str) -> bool:
    """Whether `--smooth` averages this metric: neither a schedule nor an evaluation."""
    return panel.smooth and not is_evaluation(metric)


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between the positive ends of a logarithmic axis, far enough apart to be read."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    ratio = high / low
    if ratio < 3:
        ticks = MaxNLocator(count).tick_values(low, high)
    else:
        digits = (1, 2, 3, 5) if ratio < 8 else (1, 2, 5) if ratio < 50 else (1, 3) if ratio < 1000 else (1,)
        ticks = LogLocator(subs=digits, numticks=9).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def tick_text(tick: float, top: float, digits: int) -> str:
    """The number beside a tick of an axis that ends at `top`: all with an exponent, or none, as in 0.001 and 0.0005."""
    if 1e-3 <= top < 1e-2:
        return np.format_float_positional(tick, precision=8, trim="-")
    return short(tick, digits)

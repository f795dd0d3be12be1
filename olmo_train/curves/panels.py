"""What is drawn where: panels of metrics that share a unit, x axes, marked events, and colours.

PANELS is the table to extend. A metric goes to the first panel with a pattern that matches, and is called there by the part of
its name that the pattern's `*` covers. A metric that matches none gets a separate panel.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from olmo_train.curves.runs import BOOKKEEPING, Run, Series
from olmo_train.errors import ConfigError, nearest

AXES = ("step", "tokens", "flops", "time")


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

# event: (how it is marked, shown at first)
EVENTS = {
    "resume": ("line", True),
    "spike": ("point", True),
    "skip": ("point", True),
    "rewind": ("line", True),
    "signal": ("line", False),
    "save": ("line", False),
}


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str  # label of the y axis
    patterns: dict[str, str]  # metric pattern: name of its curves; `*` in both is the same text
    log: bool = False  # y axis
    smooth: bool = True  # whether it can be smoothed; a schedule has no noise
    limit: str | None = None  # dotted configuration key of a value that is drawn as a horizontal line
    limit_name: str = ""

    @property
    def shown_unit(self) -> str:
        """The unit beside the title, unless it repeats the title."""
        return "" if self.unit == self.title.lower() else self.unit


PANELS = (
    Panel("Loss", "nats per token", {"train/CrossEntropyLoss": "training", "eval/*/CrossEntropyLoss": "validation *"}),
    Panel("Loss by source", "nats per token", {"train/source/*/CrossEntropyLoss": "*"}),
    Panel("Bits per byte", "bits per byte", {"train/BitsPerByte": "training", "train/source/*/BitsPerByte": "*",
                                             "eval/*/BitsPerByte": "validation *"}),
    Panel("Gradient norm", "L2 norm", {"optim/total_grad_norm": "gradient norm"}, log=True,
          limit="optim.max_grad_norm", limit_name="clip"),
    Panel("Learning rate", "learning rate", {"optim/learning_rate_group0": "learning rate"}, smooth=False),
    Panel("Throughput", "tokens per second", {"throughput/tokens_per_second": "all devices"}),
    Panel("Throughput per device", "tokens per second", {"throughput/device/tokens_per_second": "per device"}),
    Panel("Model FLOPs utilization", "share of peak", {"throughput/mfu": "MFU"}),
    Panel("Seconds per step", "seconds", {"throughput/step_seconds": "step",
                                          "throughput/data_wait_seconds": "waiting for data"}),
    Panel("Downstream accuracy", "accuracy", {"eval/downstream/*_acc": "*",
                                              "eval/downstream/*_len_norm": "* (length-normalized)"}),
    Panel("Downstream bits per byte", "bits per byte", {"eval/downstream/*_bpb": "*"}),
    Panel("Epochs", "times read", {"train/source/*/epoch": "*"}, smooth=False),
    Panel("Clipped steps", "share of steps", {"optim/clipping_rate": "clipped"}),
    Panel("Peak memory", "MB", {"System/Peak GPU Memory (MB)": "peak memory"}),
)  # fmt: skip

# In another panel already, or an x axis: drawn only when --metric asks for them.
REDUNDANT = ("*/Perplexity", "throughput/total_*", "optim/learning_rate_group[1-9]*", "skipped", *BOOKKEEPING)


@dataclass(frozen=True)
class Curves:
    """The metrics of these runs in one panel."""

    panel: Panel
    metrics: dict[str, str]  # {metric: name of the curve}


def choose(runs: list[Run], patterns: list[str] = ()) -> list[Curves]:
    """The panels of these runs: of every metric, or of those that match `patterns` (names, or with * ? [...]).

    Raises ConfigError when a pattern matches no metric of any run.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.series))
    wanted = [name for name in known if not any(fnmatchcase(name, pattern) for pattern in REDUNDANT)]
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ConfigError(
                    "--metric", f"no run has the metric '{pattern}'; {nearest(pattern, set(known) - set(BOOKKEEPING))}"
                )
        wanted = [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]
    found: dict[str, Curves] = {}
    for name in dict.fromkeys(wanted):
        panel, label = place(name)
        found.setdefault(panel.title, Curves(panel, {})).metrics[name] = label
    rank = {panel.title: i for i, panel in enumerate(PANELS)}
    return sorted(found.values(), key=lambda curves: rank.get(curves.panel.title, len(PANELS)))


def place(metric: str) -> tuple[Panel, str]:
    """The panel of a metric and the name of its curve there."""
    for panel in PANELS:
        for pattern, name in panel.patterns.items():
            if fnmatchcase(metric, pattern):
                before, star, after = pattern.partition("*")
                covered = metric[len(before) : len(metric) - len(after)] if star else ""
                return panel, name.replace("*", covered)
    return Panel(metric, "", {metric: metric}), metric


def legend_names(runs: list[Run], curves: Curves) -> dict[tuple[int, str], str]:
    """{(run index, metric): name of the curve in a legend}: the curve, the run, or both where both are needed."""
    found = {(i, m): name for m, name in curves.metrics.items() for i, run in enumerate(runs) if m in run.series}
    if len(runs) == 1:
        return found
    one_curve = len(set(found.values())) == 1
    return {(i, m): runs[i].name if one_curve else f"{runs[i].name}, {name}" for (i, m), name in found.items()}


def is_evaluation(metric: str) -> bool:
    """Evaluations are few: they are drawn with their points and never smoothed."""
    return metric.startswith("eval/")


def may_smooth(panel: Panel, metric: str) -> bool:
    return panel.smooth and not is_evaluation(metric)

"""The learning rate and the epochs of a planned run, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.plan.plan import visits_before

if TYPE_CHECKING:
    from olmo_train.data.mixture import Mixture
    from olmo_train.train_config import TrainConfig


POINTS = 600  # of a drawn curve


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
    from olmo_train.optim.schedules import lr_at

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

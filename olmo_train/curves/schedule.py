"""The learning rate and the epochs of a planned run, drawn as if it had been logged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.plan.plan import visits_before

if TYPE_CHECKING:
    from olmo_train.data.mixture import Mixture
    from olmo_train.train_config import TrainConfig

POINTS = 600  # of a curve


def draw(config: TrainConfig, mixture: Mixture | None, file: Path) -> None:
    """Draw learning rate and epochs over tokens, as a page or a figure."""
    import numpy as np

    from olmo_train.curves import panels
    from olmo_train.curves.runs import Run, Series
    from olmo_train.curves.write import write_curves
    from olmo_train.optim.schedules import lr_at

    points = np.linspace(1, config.steps, POINTS).astype(np.int64)
    steps = np.unique(np.append(points, np.clip(config.optim.warmup_steps, 1, config.steps)))
    values = {
        "optim/learning_rate_group0": [lr_at(step, config.optim, config.steps) for step in steps.tolist()],
        "throughput/total_tokens": [float(config.tokens_by(step)) for step in steps.tolist()],
    }
    if mixture:
        visits = np.array([visits_before(mixture, config.batches.places_before(step + 1)) for step in steps.tolist()])
        values |= {f"train/source/{name}/epoch": visits[:, i] / mixture.sizes[i] for i, name in enumerate(mixture.names)}
    run = Run("schedule", Path(config.run_dir), {name: Series(steps, np.asarray(v, float)) for name, v in values.items()})
    write_curves([run], panels.choose([run]), file, panels.View(panels.axis_of([run], "tokens")))

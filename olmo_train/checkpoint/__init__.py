"""Saving and loading checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmo_train.model.transformer import Transformer


def load_model(folder: str | Path) -> Transformer:
    """The Transformer of a checkpoint folder, or of a run_dir's newest: see `olmo_train.checkpoint.load.load_model`."""
    from olmo_train.checkpoint import load  # imports torch

    return load.load_model(folder)

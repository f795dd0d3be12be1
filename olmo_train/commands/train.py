"""train a model, or go on with a run: the same command again resumes"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG.yaml [MORE.yaml ...] [key=value ...]: what several verbs take."""
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG.yaml|key=value", help="YAML files, merged left to right, then single keys"
    )


def split_config(words: list[str]) -> tuple[list[str], list[str]]:
    """(YAML files, key=value words). A name with `=` in it is a file's when there is one, or when it ends as one."""
    files = [word for word in words if "=" not in word or word.endswith((".yaml", ".yml")) or Path(word).is_file()]
    return files, [word for word in words if word not in files]


def run(arguments: argparse.Namespace) -> None:
    from olmo_train import config
    from olmo_train.train import TrainConfig, train

    for _ in train(config.load(TrainConfig, *split_config(arguments.config))):
        pass

"""print the complete configuration of a run, with its defaults"""

from __future__ import annotations

import argparse

from olmo_train.commands.common import add_config_arguments, split_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from olmo_train import config
    from olmo_train.train_config import TrainConfig

    print(config.dump(config.load(TrainConfig, *split_config(arguments.config))), end="")

"""train a model; the same command again resumes the run"""

from __future__ import annotations

import argparse

from olmo_train.commands.common import add_config_arguments, split_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from olmo_train import config
    from olmo_train.train import TrainConfig, train

    for _ in train(config.load(TrainConfig, *split_config(arguments.config))):
        pass

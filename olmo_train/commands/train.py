"""train a model; the same command again resumes the run"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from olmo_train.commands.common import add_config_arguments, split_config
from olmo_train.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, nargs="*")
    text = "print the keys of a configuration, or those that start with PREFIX, such as optim"
    parser.add_argument("--keys", nargs="?", const="", metavar="PREFIX", help=text)


def run(arguments: argparse.Namespace) -> None:
    from olmo_train import config

    if arguments.keys is not None:
        print("\n".join(key_lines(arguments.keys)))
        return
    if not arguments.config:
        raise ConfigError(
            "olmo-train train",
            "the following arguments are required: CONFIG.yaml|key=value; for example: olmo-train train my-run.yaml",
        )
    from olmo_train.train import TrainConfig, train

    files, overrides = split_config(arguments.config)
    loaded = config.load(TrainConfig, files, overrides)
    check_run_dir(Path(config.origins(files, overrides)["run_dir"]), loaded.run_dir)
    for _ in train(loaded):
        pass


def check_run_dir(origin: Path, run_dir: str) -> None:
    """Refuse the config.yaml of a run that was moved or copied, as it would start or resume the run_dir that it names.

    `origin` is the file that set run_dir. Raises ConfigError.
    """
    folder = origin.parent
    is_of_run = origin.name == "config.yaml" and any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    if is_of_run and not (Path(run_dir).exists() and folder.samefile(run_dir)):
        fix = f"add run_dir={folder} to continue the run in {folder}, or run_dir=NEW to start another one"
        raise ConfigError(origin, f"lies in {folder}, but names run_dir {run_dir}; {fix}")


def key_lines(prefix: str, width: int | None = None) -> Iterator[str]:
    """Each key that starts with `prefix` as one types it, with its default, its type, and its meaning; an empty line between
    sections. `width` is by default that of the terminal. Raises ConfigError when no key does."""
    import shutil
    import textwrap

    from olmo_train.train_config import find_keys

    width, last = width or min(shutil.get_terminal_size().columns, 100), None
    for key in find_keys(prefix):
        section = key.name.rpartition(".")[0].partition(".")[0]
        if last not in (None, section):
            yield ""
        last = section
        yield f"{key.name}={key.default}"
        yield textwrap.indent(textwrap.fill(f"({key.kind}) {key.meaning}", width - 4, break_on_hyphens=False), "    ")

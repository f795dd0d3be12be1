"""print the complete configuration of a run, or compare those of two"""

from __future__ import annotations

import argparse
import json

from olmo_train.commands.common import add_config_arguments, load_config, split_config
from olmo_train.errors import ConfigError, no_such_file

COMMENT_COLUMN = 44  # where comments begin, unless the value is longer
NO_SUCH_KEY = "(no such key)"  # of a source that the other run does not have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print every key as YAML, with a comment that names what set its value: a file, the command line, or the default. "
        "The output is a valid configuration file."
    )
    add_config_arguments(parser, nargs="*")
    text = "print only the keys that differ between two run_dirs or YAML files, with both values"
    parser.add_argument("--diff", nargs=2, metavar="RUN", help=text)


def run(arguments: argparse.Namespace) -> None:
    from olmo_train import config
    from olmo_train.train_config import TrainConfig

    if arguments.diff:
        if arguments.config:
            raise ConfigError("--diff", f"compares two runs and takes nothing else; leave out {' '.join(arguments.config)}")
        print("\n".join(differences(*arguments.diff)))
        return
    if not arguments.config:
        raise ConfigError("olmo-train config", "names no configuration; type olmo-train config CONFIG.yaml, or --diff RUN RUN")
    files, overrides = split_config(arguments.config)
    text = config.dump(config.load(TrainConfig, files, overrides))
    print("\n".join(commented(text, config.origins(files, overrides))))


def commented(text: str, origins: dict[str, str]) -> list[str]:
    """The lines of a YAML mapping, with a comment at the end of each value, or behind the key of a list: what set it."""
    import yaml

    lines, comments = text.splitlines(), {}

    def visit(node: yaml.Node, key: str) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for name, value in node.value:
                visit(value, f"{key}.{name.value}".lstrip("."))
            return
        is_block = isinstance(node, yaml.SequenceNode) and not node.flow_style
        line = node.start_mark.line - 1 if is_block else node.end_mark.line
        comments[line] = origins.get(key, "default")

    visit(yaml.compose(text, yaml.SafeLoader), "")
    return [f"{line:<{COMMENT_COLUMN - 1}} # {comments[i]}" if i in comments else line for i, line in enumerate(lines)]


def differences(one: str, other: str) -> list[str]:
    """The lines that show each key with different values in two run_dirs or YAML files. A key that is not set has its default."""
    from pathlib import Path

    from olmo_train.config import flatten, to_dict

    for name in (one, other):
        if not Path(name).exists():
            raise ConfigError(name, no_such_file(Path(name), "name a YAML file or a run_dir"))
    files = [str(Path(name) / "config.yaml") if Path(name).is_dir() else name for name in (one, other)]
    before, after = (flatten(to_dict(load_config([file]))) for file in files)
    rows = [
        (key, *(_typed(side[key]) if key in side else NO_SUCH_KEY for side in (before, after)))
        for key in dict.fromkeys([*before, *after])
        if before.get(key, NO_SUCH_KEY) != after.get(key, NO_SUCH_KEY)
    ]
    if not rows:
        return ["every key has the same value in both"]
    rows = [("", one, other), *rows]
    key_width, width = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"{key:<{key_width}}  {left:<{width}}  {right}" for key, left, right in rows]


def _typed(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)

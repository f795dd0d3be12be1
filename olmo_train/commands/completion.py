"""Completion of verbs, options, files and configuration keys by the Tab key, with the library argcomplete."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator


class PrintScript(argparse.Action):
    """`--completion SHELL` prints the script: eval "$(olmo-train --completion bash)" in a shell, or in its ~/.bashrc."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, choices=("bash", "zsh", "fish"), metavar="SHELL", help=help)

    def __call__(self, parser, namespace, shell, option_string=None):
        try:
            import argcomplete
        except ImportError:
            parser.error(f"argument {option_string}: needs argcomplete; pip install 'olmo-train[completion]'")
        print(argcomplete.shellcode(["olmo-train"], shell=shell))
        parser.exit()


def typed_words() -> list[str] | None:
    """The words typed so far when the shell asks for the next one, which it does through the environment; else None."""
    return os.environ.get("COMP_LINE", "").split()[1:] if "_ARGCOMPLETE" in os.environ else None


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit. Without argcomplete, do nothing."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser, always_complete_options="long")


def config_words(prefix: str, **_) -> Iterator[str]:
    """What may follow where CONFIG.yaml or key=value is expected: YAML files, keys, and the values of a key that has few."""
    from argcomplete.completers import FilesCompleter

    from olmo_train.train_config import SHORT_NAMES, keys

    name, equals, _value = prefix.partition("=")
    if not equals:
        yield from FilesCompleter(("yaml", "yml"))(prefix)
    for key in keys():
        if not equals:
            yield f"{key.name}="
        elif key.name == name:
            values = key.kind.replace("bool", "true | false").split(" | ")
            yield from (f"{name}={value}" for value in values if " " not in value and value not in SHORT_NAMES.values())

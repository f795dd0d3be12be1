"""What several verbs share: configuration and checkpoint arguments, opening a model, and tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.commands.completion import config_words
from olmo_train.errors import ConfigError, check_choice

if TYPE_CHECKING:
    from olmo_train.data.templates import ChatFormat
    from olmo_train.data.tokenizer import Tokenizer
    from olmo_train.model.transformer import Transformer
    from olmo_train.train_config import TrainConfig


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[str] | None = None,
    title: str = "",
    total: Sequence[str] | None = None,
) -> None:
    """Columns named in `left`, or else the first, to the left, the others to the right; unwrapped where it is no terminal."""
    from rich import box
    from rich.table import Table

    from olmo_train.log.console import rich_console

    console = rich_console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[:1] if left is None else left) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*("".join(c if c.isprintable() else "\ufffd" for c in cell) for cell in row))  # no codes for the terminal
    if total:
        table.add_row(*total, style="bold")
    if title:
        console.print(f"\n{title}", style="bold")
    console.print(table)


def watch(items, what: str, total: int):
    """A progress bar on stderr, if that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from olmo_train.log.console import is_terminal, rich_console

    def watched():
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        console = rich_console(stderr=True)
        with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
            yield from progress.track(items, total, description=what)

    return watched() if is_terminal(sys.stderr) else items


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, --tokenizer and --device: what verbs that run a trained model take."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint folder, or a run_dir for its newest")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FILE", help="default: the checkpoint's own tokenizer.json")
    add_allow_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")


def add_allow_argument(parser: argparse.ArgumentParser) -> None:
    """--eos and --allow-other-tokenizer: what verbs that open a tokenizer take."""
    parser.add_argument("--eos", metavar="TOKEN", help="the token that ends a document (default: as the tokenizer's folder says)")
    what = "only warn when the tokenizer is not the checkpoint's"
    parser.add_argument("--allow-other-tokenizer", action="store_true", help=what)


def open_model(checkpoint: Path, device: str | None) -> tuple[Path, Transformer]:
    """The checkpoint folder that is meant, and its model, fp32, on the device. Raises CheckpointError, ConfigError."""
    import torch

    from olmo_train.checkpoint import folders, load

    is_folder = (checkpoint / "MANIFEST.json").is_file()  # which load_model verifies by itself
    folder = checkpoint if is_folder else folders.resolve(checkpoint)
    model = load.load_model(folder)
    try:
        return folder, model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as problem:
        raise ConfigError("--device", f"{device} cannot be used: {str(problem).splitlines()[0]}") from problem


def open_tokenizer(folder: Path, args: argparse.Namespace, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint, or the one of --tokenizer instead.

    Raises ConfigError when there is none or it does not fit, DataError when it is another one than the checkpoint's.
    """
    from olmo_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(_tokenizer_file(folder, args), eos=args.eos)
    _check_tokenizer(tokenizer, folder, args, vocab_size)
    return tokenizer


def add_template_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """--template and --instruction: how prompts are written, as in prepare-data. `default` says what happens without them."""
    names = "plain, chatml, llama3, ..."
    parser.add_argument("--template", metavar="NAME", help=f"write prompts as prepare-data --template does: {names} ({default})")
    what = "text before each prompt (default: that of the checkpoint's data, if they have this template)"
    parser.add_argument("--instruction", metavar="TEXT", help=what)


def check_template(args: argparse.Namespace) -> None:
    """Refuse an unknown --template before anything is loaded. Raises ConfigError."""
    from olmo_train.data.templates import TEMPLATES

    if args.template is not None:
        check_choice("--template", args.template, TEMPLATES)


def open_chat(folder: Path, args: argparse.Namespace, vocab_size: int) -> ChatFormat | None:
    """The template of --template, or else of a checkpoint's data, with the tokenizer; None without either.

    Raises as `open_tokenizer`, and ConfigError for an unknown template or an instruction without one.
    """
    from olmo_train.data.templates import open_format, recorded_template

    recorded = recorded_template(folder) or {}
    name, instruction = args.template or recorded.get("name"), args.instruction
    if name is None:
        if instruction is not None:
            raise ConfigError("--instruction", "needs --template, which says where the text stands; name one, such as plain")
        return None
    if instruction is None and recorded.get("name") == name:
        instruction = recorded.get("instruction")
    chat = open_format(name, _tokenizer_file(folder, args), args.eos, instruction)
    _check_tokenizer(chat.tokenizer, folder, args, vocab_size)
    return chat


def _tokenizer_file(folder: Path, args: argparse.Namespace) -> str | Path:
    named, own = args.tokenizer, folder / "tokenizer.json"
    if named is None and not own.is_file():
        raise ConfigError("--tokenizer", f"{folder} holds no tokenizer.json, since its data were raw token files; name the file")
    return named or own


def _check_tokenizer(tokenizer: Tokenizer, folder: Path, args: argparse.Namespace, vocab_size: int) -> None:
    from olmo_train.data.tokenizer import OTHER_TOKENIZER, check_same_tokenizer, record_of_folder

    records = [record_of_folder(folder), tokenizer.record("--tokenizer")]
    check_same_tokenizer(records, not args.allow_other_tokenizer, OTHER_TOKENIZER)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError("--tokenizer", f"{tokenizer.name} has {tokenizer.vocab_size} ids, the model only {vocab_size}")


def check_counts(args: argparse.Namespace, *options: str) -> None:
    """Refuse a count below 1; None is an option that is not given. Raises ConfigError."""
    for option in options:
        if (count := getattr(args, option)) is not None and count < 1:
            raise ConfigError(f"--{option.replace('_', '-')}", f"must be at least 1, got {count}")


def add_config_arguments(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    """CONFIG.yaml [MORE.yaml ...] [key=value ...]: what several verbs take."""
    text = "YAML files, merged left to right, then single keys"
    words = parser.add_argument("config", nargs=nargs, metavar="CONFIG.yaml|key=value", help=text)
    words.completer = config_words  # type: ignore[attr-defined]  # where argcomplete looks


def split_config(words: list[str]) -> tuple[list[str], list[str]]:
    """(YAML files, key=value words). A name with `=` in it is a file's when there is one, or when it ends as one."""
    files = [word for word in words if "=" not in word or word.endswith((".yaml", ".yml")) or Path(word).is_file()]
    return files, [word for word in words if word not in files]


def load_config(words: list[str]) -> TrainConfig:
    """The configuration of a verb that needs neither run_dir nor data: a model's file alone is enough."""
    from olmo_train import config
    from olmo_train.plan.plan import UNNAMED
    from olmo_train.train_config import TrainConfig

    values = config.read(*split_config(words))
    values.setdefault("run_dir", UNNAMED)
    values.setdefault("data", {"sources": {UNNAMED: {"path": UNNAMED}}})
    return config.build(TrainConfig, values)

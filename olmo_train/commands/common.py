"""What several verbs share: configuration and checkpoint arguments, opening a model, tables and number formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from olmo_train.data.tokenizer import Tokenizer
    from olmo_train.model.transformer import Transformer


def table(
    console: Console, title: str, columns: list[str], rows: list[list[str]], total: list[str] | None = None, text: tuple = (0,)
) -> None:
    """One table under its title; the columns of `text` are words, the others are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i in text else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    if total:
        made.add_row(*total, style="bold")
    console.print(f"\n{title}" if title else "", style="bold")
    console.print(made)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def energy(kwh: float) -> str:
    return f"{kwh / 1000:,.4g} MWh" if kwh >= 1000 else f"{kwh:.3g} kWh"


def mass(kg: float) -> str:
    return f"{kg / 1000:,.3g} t" if kg >= 1000 else f"{kg:.3g} kg"


def watch(items, what: str, total: int):
    """A progress bar on stderr, if that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from olmo_train.log.console import is_terminal, rich_console

    def watched():
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=rich_console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total, description=what)

    return watched() if is_terminal(sys.stderr) else items


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[str, ...] = ()) -> None:
    """A table on stdout, not wrapped when that is no terminal. `left`: the columns of words, by default the first."""
    from olmo_train.log.console import rich_console

    text = tuple(i for i, column in enumerate(columns) if column in (left or columns[:1]))
    clean = [["".join(c if c.isprintable() else "\ufffd" for c in cell) for cell in row] for row in rows]  # no terminal codes
    table(rich_console(width=None if sys.stdout.isatty() else 200), "", list(columns), clean, text=text)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, --tokenizer and --device: what verbs that run a trained model take."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint folder, or a run_dir for its newest")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FILE", help="default: the checkpoint's own tokenizer.json")
    add_allow_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")


def add_allow_argument(parser: argparse.ArgumentParser) -> None:
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
    from olmo_train.data.tokenizer import OTHER_TOKENIZER, check_same_tokenizer, load_tokenizer, record_of_folder

    named, own = args.tokenizer, folder / "tokenizer.json"
    if named is None and not own.is_file():
        raise ConfigError("--tokenizer", f"{folder} holds no tokenizer.json, since its data were raw token files; name the file")
    tokenizer = load_tokenizer(named or own, eos=args.eos)
    records = [record_of_folder(folder), tokenizer.record("--tokenizer")]
    check_same_tokenizer(records, not args.allow_other_tokenizer, OTHER_TOKENIZER)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError("--tokenizer", f"{tokenizer.name} has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    return tokenizer


def add_config_arguments(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    """CONFIG.yaml [MORE.yaml ...] [key=value ...]: what several verbs take."""
    text = "YAML files, merged left to right, then single keys"
    parser.add_argument("config", nargs=nargs, metavar="CONFIG.yaml|key=value", help=text)


def split_config(words: list[str]) -> tuple[list[str], list[str]]:
    """(YAML files, key=value words). A name with `=` in it is a file's when there is one, or when it ends as one."""
    files = [word for word in words if "=" not in word or word.endswith((".yaml", ".yml")) or Path(word).is_file()]
    return files, [word for word in words if word not in files]

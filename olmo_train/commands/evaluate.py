"""measure a checkpoint on held-out text"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train.commands.generate import add_checkpoint_arguments, open_model

if TYPE_CHECKING:
    from olmo_train.data.shards import TokenSource
    from olmo_train.eval.heldout import HeldOut
    from olmo_train.model.transformer import Transformer
    from olmo_train.recipe import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME=PATH",
        help="a source of tokens to measure on, instead of the run's data.validation",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences at once (default: the run's micro_batch_size)")
    parser.add_argument("--no-unigram", action="store_true", help="do not read the training data for the unigram loss")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the JSON to a file as well")


def run(args: argparse.Namespace) -> None:
    from olmo_train import config as configuration
    from olmo_train.checkpoint import read_state
    from olmo_train.recipe import TrainConfig

    folder, model = open_model(args.checkpoint, args.device)
    config = configuration.load(TrainConfig, [folder / "config.yaml"])
    result = {"checkpoint": str(folder), "step": read_state(folder)["step"]}
    result["sources"] = {held_out.source: held_out for held_out in _held_out(model, config, result["step"], args)}
    _report(result, args)


def _held_out(model: Transformer, config: TrainConfig, step: int, args: argparse.Namespace) -> list[HeldOut]:
    from olmo_train.eval.heldout import measure, training_counts

    rows, vocab_size = args.batch_size or config.micro_batch_size, config.model.vocab_size
    sources, counts = _sources(config, args), None
    if not args.no_unigram:
        counts = training_counts(config.data, config.seed, step, config.global_batch_size, config.model.seq_len, vocab_size)
    return [measure(model, source, rows, config.data.document_mask, counts, _watch) for source in sources]


def _sources(config: TrainConfig, args: argparse.Namespace) -> list[TokenSource]:
    from olmo_train.data.shards import SourceConfig, open_source
    from olmo_train.errors import ConfigError

    named = config.data.validation
    if args.data is not None:
        for word in args.data:
            if not all(word.partition("=")):
                raise ConfigError("--data", f"'{word}' is not NAME=PATH")
        named = {word.partition("=")[0]: SourceConfig(word.partition("=")[2]) for word in args.data}
    if not named:
        raise ConfigError("data.validation", "names no held-out source in this run; give one with --data NAME=PATH")
    return [open_source(name, source, config.model.vocab_size, config.data.eos_id) for name, source in named.items()]


def _watch(items, what: str, total: int):
    """A progress bar on stderr where somebody sees it."""
    import sys

    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, console=Console(stderr=True), transient=True) if sys.stderr.isatty() else items


def _report(result: dict[str, Any], args: argparse.Namespace) -> None:
    plain = result | {"sources": {name: asdict(held_out) for name, held_out in result["sources"].items()}}
    text = json.dumps(plain, indent=1)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
        return
    print(f"{result['checkpoint']}, after {result['step']:,} steps; losses in nats a token")
    columns = ("source", "tokens", "loss", "perplexity", "bits/byte", "unigram loss", "uniform loss")
    print_table(columns, [
        (h.source, f"{h.tokens:,}", _number(h.loss), _number(h.perplexity, 2), _number(h.bits_per_byte), _number(h.unigram_loss),
         _number(h.uniform_loss)) for h in result["sources"].values()
    ])  # fmt: skip


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[str, ...] | None = None) -> None:
    """Columns named in `left`, or else the first, to the left, the others to the right; unwrapped where it is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in (left or columns[:1]) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)

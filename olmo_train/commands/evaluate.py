"""measure a checkpoint on held-out text"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train.commands.common import add_checkpoint_arguments, open_model, open_tokenizer, print_table, watch
from olmo_train.formats import counted, decimal

if TYPE_CHECKING:
    from olmo_train.data.shards import TokenSource
    from olmo_train.eval.downstream import Downstream
    from olmo_train.eval.heldout import HeldOut
    from olmo_train.model.transformer import Transformer
    from olmo_train.train_config import TrainConfig

FIGURES = ("source", "tokens", "loss", "perplexity", "bits_per_byte", "unigram_loss", "uniform_loss")  # of a held-out source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the loss, perplexity and bits per byte of a checkpoint on held-out sources, beside the losses of a unigram "
        "model of the training data and of a uniform model; and, with --tasks, its accuracy on downstream tasks."
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--data", action="append", metavar="NAME=PATH", help="a source to measure on, instead of the run's data.validation"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="downstream tasks: piqa, hellaswag, ..., NAME/VARIANT, requests.jsonl files, or all; then no source unless --data",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of each task, evenly spread")
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences at once (default: the run's micro_batch_size)")
    parser.add_argument("--no-unigram", action="store_true", help="do not read the training data for the unigram loss")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the JSON to a file as well")


def run(args: argparse.Namespace) -> None:
    from olmo_train import config as configuration
    from olmo_train.checkpoint.folders import read_state
    from olmo_train.errors import ConfigError
    from olmo_train.history import data_config

    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError("--batch-size", f"must be at least 1, got {args.batch_size}")
    folder, model = open_model(args.checkpoint, args.device)
    values = configuration.read([folder / "config.yaml"])
    rows = args.batch_size or configuration.decoded(values).get("micro_batch_size", 4)
    config = data_config(values) if values.get("data") else None  # an imported checkpoint has no data
    result: dict[str, Any] = {"checkpoint": str(folder), "step": read_state(folder)["step"]}
    if args.tasks is not None:
        result["tasks"] = _downstream(model, folder, rows, args)
    if args.tasks is None or args.data is not None:
        result["sources"] = _held_out(model, folder, config, rows, args)
    _report(result, args)


def _downstream(model: Transformer, folder: Path, rows: int, args: argparse.Namespace) -> list[Downstream]:
    from olmo_train.eval.downstream import load_task, results_of, score
    from olmo_train.eval.tasks import TASKS

    tokenizer = open_tokenizer(folder, args, model.config.vocab_size)
    words = list(TASKS) if args.tasks == "all" else args.tasks.split(",")
    tasks = [load_task(word, tokenizer, model.config.seq_len, args.limit) for word in words]
    batch_tokens = rows * model.config.seq_len
    return [results_of(task, score(model, task, batch_tokens, watch=watch).tolist()) for task in tasks]


def _held_out(model: Transformer, folder: Path, config: TrainConfig | None, rows: int, args: argparse.Namespace) -> list[HeldOut]:
    from olmo_train.checkpoint.folders import read_state
    from olmo_train.eval.heldout import measure, training_counts

    sources = _sources(model.config.vocab_size, folder, config, args)
    state, counts = read_state(folder), None
    if config and not args.no_unigram:
        counts = training_counts(lambda: config.mixture(state.get("batches", ())), state["step"])
    return [measure(model, source, rows, bool(config and config.data.document_mask), counts, watch) for source in sources]


def _sources(vocab_size: int, folder: Path, config: TrainConfig | None, args: argparse.Namespace) -> list[TokenSource]:
    from olmo_train.data.config import SourceConfig
    from olmo_train.data.shards import open_source
    from olmo_train.data.tokenizer import OTHER_TOKENIZER, check_same_tokenizer, record_of_folder
    from olmo_train.errors import ConfigError

    named = config.data.validation if config else {}
    if args.data is not None:
        for word in args.data:
            if not all(word.partition("=")):
                raise ConfigError("--data", f"'{word}' is not NAME=PATH")
        words = [word.partition("=") for word in args.data]
        named = {name: SourceConfig(os.path.expanduser(path)) for name, _, path in words}
        if len(named) < len(words):
            raise ConfigError("--data", f"names a source twice: {' '.join(args.data)}; each needs a different name")
    if not named:
        raise ConfigError("data.validation", "names no held-out source in this run; use --data NAME=PATH, or --tasks")
    eos_id = config.data.eos_id if config else None
    where = "--data {}" if args.data else "data.validation.{}.path"
    sources = [open_source(name, source, vocab_size, eos_id, where.format(name)) for name, source in named.items()]
    allowed = args.allow_other_tokenizer or (args.data is None and not config.data.check_tokenizer)
    records = [source.tokenizer_record(f"{'--data' if args.data else 'data.validation'} {source.name}") for source in sources]
    check_same_tokenizer([record_of_folder(folder), *records], not allowed, OTHER_TOKENIZER)
    return sources


def _report(result: dict[str, Any], args: argparse.Namespace) -> None:
    held_out, tasks = result.get("sources", []), result.get("tasks", [])
    plain = {
        "checkpoint": result["checkpoint"],
        "step": result["step"],
        "sources": {h.source: {name: getattr(h, name) for name in FIGURES} for h in held_out},
        "tasks": {t.task: asdict(t) for t in tasks},
    }
    text = json.dumps(plain, indent=1)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return
    print(f"{result['checkpoint']}, after {counted(result['step'], 'step')}")
    if held_out:
        columns = ("source", "tokens", "loss (nats/token)", "perplexity", "bits/byte", "unigram loss", "uniform loss")
        rows = [(h.source, f"{h.tokens:,}", decimal(h.loss), decimal(h.perplexity, 2), decimal(h.bits_per_byte),
                 decimal(h.unigram_loss), decimal(h.uniform_loss)) for h in held_out]  # fmt: skip
        print_table(columns, rows)
    if tasks:
        columns = ("task", "questions", "accuracy %", "±", "length-normed %", "chance %", "bits/byte of the answer")
        rows = [(t.task, f"{t.questions:,}", *(decimal(share and 100 * share, 1) for share in (t.acc, t.acc_error, t.len_norm,
                 t.chance)), decimal(t.bits_per_byte)) for t in tasks]  # fmt: skip
        print_table(columns, rows)

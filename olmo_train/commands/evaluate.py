"""measure a checkpoint on held-out text"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_train.commands.common import (
    add_checkpoint_arguments,
    add_template_arguments,
    check_counts,
    check_template,
    open_chat,
    open_model,
    open_tokenizer,
    print_table,
    watch,
)
from olmo_train.formats import counted, decimal
from olmo_train.storage import replace_file

if TYPE_CHECKING:
    from olmo_train.data.shards import TokenSource
    from olmo_train.eval.downstream import Downstream
    from olmo_train.eval.heldout import HeldOut
    from olmo_train.eval.summaries import Answer, Example, Interval, Summaries
    from olmo_train.model.transformer import Transformer
    from olmo_train.parallel.world import World
    from olmo_train.train_config import TrainConfig

PATIENCE = 86400  # seconds that a process waits for the answers of another one; one that is gone is noticed at once
FIGURES = ("source", "tokens", "loss", "perplexity", "bits_per_byte", "unigram_loss", "uniform_loss")  # of a held-out source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the loss, perplexity and bits per byte of a checkpoint on held-out sources, beside the losses of a unigram "
        "model of the training data and of a uniform model; with --tasks, its accuracy on downstream tasks; with --rouge, the "
        "ROUGE of the texts that it writes. With --rouge, the processes of torchrun share the examples."
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
    parser.add_argument(
        "--rouge", type=Path, metavar="TEST.jsonl",
        help="prompts and responses, or messages: answer each prompt greedily and compare; then no source unless --data",
    )  # fmt: skip
    add_template_arguments(parser, "with --rouge; default: that of the checkpoint's data")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer with --rouge (default: 64)")
    parser.add_argument("--predictions", type=Path, metavar="FILE.jsonl", help="with --rouge: write each answer to this file")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of each task or of --rouge, evenly spread")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="sequences at once (default: the run's micro_batch_size; 16 with --rouge)"
    )
    parser.add_argument("--no-unigram", action="store_true", help="do not read the training data for the unigram loss")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the JSON to a file as well")


def run(args: argparse.Namespace) -> None:
    from olmo_train.parallel.processes import announced

    _check(args)
    if args.rouge and announced().size > 1:
        from olmo_train.parallel.world import explain_lost_peers, join_world

        with explain_lost_peers(), join_world(timeout_seconds=PATIENCE) as world:
            _run(args, world)
    else:
        _run(args, None)


def _check(args: argparse.Namespace) -> None:
    from olmo_train.errors import ConfigError

    check_template(args)
    check_counts(args, "batch_size", "limit", "max_new_tokens")
    if args.rouge:
        from olmo_train.eval.summaries import check_installed

        check_installed()
    else:
        for option, what in (("predictions", "are the answers"), ("template", "writes the prompts"), ("instruction", "is text")):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option}", f"{what} of --rouge TEST.jsonl; name that file too")


def _run(args: argparse.Namespace, world: World | None) -> None:
    """On each of the processes that share the examples of --rouge; rank 0 does the rest and reports."""
    from olmo_train import config as configuration
    from olmo_train.checkpoint.folders import read_state
    from olmo_train.eval.summaries import read_examples
    from olmo_train.history import data_config

    examples = read_examples(args.rouge, args.limit) if args.rouge else []
    folder, model = open_model(args.checkpoint, args.device)
    values = configuration.read([folder / "config.yaml"])
    rows = args.batch_size or configuration.decoded(values).get("micro_batch_size", 4)
    config = data_config(values) if values.get("data") else None  # an imported checkpoint has no data
    result: dict[str, Any] = {"checkpoint": str(folder), "step": read_state(folder)["step"]}
    if args.rouge:
        result["rouge"] = _rouge(model, folder, examples, args, world)
    if world is not None and not world.is_main:
        return
    if args.tasks is not None:
        result["tasks"] = _downstream(model, folder, rows, args)
    if args.tasks is None and args.rouge is None or args.data is not None:
        result["sources"] = _held_out(model, folder, config, rows, args)
    _report(result, args)


def _rouge(
    model: Transformer, folder: Path, examples: list[Example], args: argparse.Namespace, world: World | None
) -> Summaries | None:
    """On rank 0, the results of all ranks; also writes --predictions."""
    from olmo_train.errors import ConfigError
    from olmo_train.eval.summaries import answer, chat_ids, fit, plain_ids, summarize

    chat = open_chat(folder, args, model.config.vocab_size)
    tokenizer = chat.tokenizer if chat else open_tokenizer(folder, args, model.config.vocab_size)
    room = model.config.seq_len + 1 - args.max_new_tokens  # the last token of an answer is not read
    if room < 1:
        what = f"{args.max_new_tokens} leaves no room for a prompt in seq_len {model.config.seq_len}"
        raise ConfigError("--max-new-tokens", f"{what}; use at most {model.config.seq_len}")
    encode = partial(chat_ids, chat) if chat else partial(plain_ids, tokenizer)
    fitted = [fit(example, encode, room) for example in examples]
    cut = sum(example.document != short.document for example, (short, _) in zip(examples, fitted, strict=True))
    prompts = [ids or [tokenizer.eos_id] for _, ids in fitted]
    rank, size = (world.rank, world.size) if world else (0, 1)
    shown = watch if rank == 0 else lambda items, *_: items
    mine = answer(model, tokenizer, prompts, args.max_new_tokens, args.batch_size or 16, rank, size, shown)
    answers: dict[int, Answer] = {}
    for part in world.gather(mine) if world else [mine]:
        answers |= part
    if rank != 0:
        return None
    results, predictions = summarize(examples, [answers[i] for i in range(len(examples))], cut)
    if args.predictions:
        args.predictions.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
        replace_file(args.predictions.absolute(), lines.encode())
    return results


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
    if rouge := result.get("rouge"):
        plain["rouge"] = asdict(rouge)
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
    if rouge:
        _print_rouge(rouge)


def _print_rouge(rouge: Summaries) -> None:
    from olmo_train.eval.summaries import SCORES

    def row(name: str, scores: dict[str, Interval], words: float) -> tuple[str, ...]:
        cells = (f"{100 * scores[key].f1:.2f} ({100 * scores[key].low:.2f} to {100 * scores[key].high:.2f})" for key in SCORES)
        return name, *cells, decimal(words, 1)

    rows = [row("the model", rouge.scores, rouge.words["prediction"]), row("lead-1", rouge.lead_1, rouge.words["lead_1"])]
    rows += [(name + "s", *("" for _ in SCORES), decimal(rouge.words[name], 1)) for name in ("reference", "document")]
    print_table(("F1 (95% interval)", *SCORES.values(), "words"), rows)
    cut = f"; {counted(rouge.cut_prompts, 'document')} cut at the end to fit" if rouge.cut_prompts else ""
    print(f"{counted(rouge.examples, 'example')}; {100 * rouge.ended:.1f}% of the answers ended by themselves{cut}")

"""show what a step trains on, or which steps see a document"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.commands.common import print_table, split_config
from olmo_train.errors import ConfigError
from olmo_train.formats import counted

if TYPE_CHECKING:
    from olmo_train.data.inspect import Row, Visit
    from olmo_train.data.mixture import Mixture
    from olmo_train.history import Attempt, History

SHOWN_ROWS = 64  # of a step, or of a document's visits, in the table; --json prints all
SHOWN_TOKENS = 24  # of each instance's text in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compute the instances of any step of a run, past or future, or every step that reads a document, with the "
        "configuration that the run had at that step. Needs the data, and no GPU, process group or torch."
    )
    parser.add_argument(
        "config", nargs="+", metavar="RUN_DIR|CONFIG.yaml|key=value", help="a run_dir, or YAML files and keys as for train"
    )
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--step", type=int, metavar="N", help="show the global batch of step N, counted from 1")
    question.add_argument(
        "--document", metavar="SOURCE:ID", help="show the steps that read this document; SOURCE:@N is the one that holds token N"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="only the rows of this rank")
    parser.add_argument(
        "--world-size", type=int, metavar="W", help="processes (default: as the run had them at that step, else 1)"
    )
    parser.add_argument("--brief", action="store_true", help="skip documents and text, whose lookup takes most of the time")
    parser.add_argument("--json", action="store_true", help="print JSON, with the whole text of each instance")


def run(args: argparse.Namespace) -> None:
    from olmo_train import config as configuration
    from olmo_train.history import History, data_config

    folders = [w for w in args.config if Path(w).is_dir() and ("=" not in w or (Path(w) / "config.yaml").is_file())]
    files, overrides = split_config([word for word in args.config if word not in folders])
    run_dir = Path(folders[0]) if len(folders) == 1 and not files else None  # wherever it has been moved to
    config = data_config(configuration.read([run_dir / "config.yaml"] if run_dir else folders + files, overrides))
    history = History(run_dir or Path(config.run_dir), config)
    if args.step is not None:
        _show_step(history, args)
    else:
        _show_document(history, args)


def _show_step(history: History, args: argparse.Namespace) -> None:
    from olmo_train.data.inspect import TextReader, rows_of_step

    attempt = history.attempt_of(args.step)
    mixture, world_size = attempt.mixture(), _world_size(attempt, args)
    rows = rows_of_step(mixture, args.step, world_size, args.rank, None if args.json else SHOWN_ROWS, not args.brief)
    texts = [None] * len(rows) if args.brief else TextReader(mixture).of(rows, None if args.json else SHOWN_TOKENS)
    sample_hash, logged = mixture.sample_hash(mixture.global_batch(args.step)), history.line(args.step)
    as_logged = logged["sample_hash"] == sample_hash if logged and "sample_hash" in logged else None
    if as_logged is False:
        logging.getLogger(__name__).warning(
            "the run logged another sample_hash for step %d: its data or configuration were not these", args.step
        )
    passed_over = args.step in history.rewound_steps.union(attempt.config.guards.skip_steps)
    if args.json:
        about = {"step": args.step, "world_size": world_size, "sample_hash": sample_hash, "as_logged": as_logged}
        instances = [{**asdict(row), "text": text} for row, text in zip(rows, texts, strict=True)]
        print(json.dumps({**about, "passed_over": passed_over, "instances": instances}, ensure_ascii=False))
        return
    note = {None: "", True: ", as the run logged it", False: ", NOT as the run logged it"}[as_logged]
    size = mixture.batches.at(args.step)
    print(f"step {args.step} of {history.steps}: {counted(size, 'instance')} of {mixture.seq_len} tokens "
          f"on {counted(world_size, 'rank')}, sample_hash {sample_hash[:16]}{note}")  # fmt: skip
    if pack := mixture.sources[0].pack:  # then all sources are, in the same windows
        print(f"packed: no document crosses a window of {pack} tokens")
    if passed_over:
        print("this step is passed over: its batch is not trained on")
    print_table(("row", "rank", "source", "instance", "epoch", "documents", "text"), [
        (str(row.row), str(row.rank), row.source, str(row.instance), str(row.epoch), _names(row),
         "" if text is None else " ".join(text.split())[:60]) for row, text in zip(rows, texts, strict=True)
    ], left=("source", "documents", "text"))  # fmt: skip
    hidden = size // (1 if args.rank is None else world_size) - len(rows)
    if hidden:
        print(f"... and {counted(hidden, 'more row')}; --rank R shows those of one rank, --json all")


def _world_size(attempt: Attempt, args: argparse.Namespace) -> int:
    return args.world_size if args.world_size is not None else attempt.event.get("data_size", attempt.world_size) or 1


def _names(row: Row) -> str:
    """The first document of a row, the number of further ones, padding, and how many of all are denied."""
    names = [d.id or f"{Path(d.origin).name}@{d.start}" for d in row.documents]
    if not names:
        return "-"
    denied = sum(d.denied for d in row.documents)
    mark = "" if not denied else " (denied)" if denied == len(names) else f" ({denied} denied)"
    padding = "" if row.padding is None else f", {row.padding} of padding"
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") + padding + mark


def _show_document(history: History, args: argparse.Namespace) -> None:
    from olmo_train.data.inspect import find_documents

    if args.rank is not None:
        raise ConfigError("--rank", "goes with --step; --document shows the rank of every visit")
    mixture = history.attempts[-1].mixture()
    source, found = find_documents(mixture, args.document)
    done = history.last_step()
    visits = [
        {**asdict(visit), "rank": rank, "done": visit.step <= done, "start": start}
        for start, visit, rank in _visits(history, mixture, args)
    ]
    visits.sort(key=lambda visit: (visit["step"], visit["row"]))
    reads = Counter(visit["start"] for visit in visits)
    if args.json:
        documents = [{"source": mixture.names[source], **asdict(d), "reads": reads[d.start]} for d in found]
        about = {"document": documents[0], "documents": documents}  # the first, and all of this id
        print(json.dumps(about | {"done_steps": done, "total_steps": history.steps, "visits": visits}))
        return
    if len(found) > 1:
        print(f"{args.document} is the id of {counted(len(found), 'document')}")
    for d in found[:SHOWN_ROWS]:
        read = f", {counted(reads[d.start], 'read')}" if len(found) > 1 else ""
        print(f"{args.document} from {d.origin}: {d.end - d.start:,} tokens at {d.start:,} of its source{read}")
    if len(found) > SHOWN_ROWS:
        print(f"... and {len(found) - SHOWN_ROWS:,} more; --json lists all")
    if found[0].denied:
        print("data.deny denies it: its tokens are read as context, and nothing is learned from predicting them")
    past = sum(visit["done"] for visit in visits)
    print(f"reads: {past:,} done, up to step {done:,}, and {len(visits) - past:,} to come, up to step {history.steps:,}")
    print_table(("step", "", "rank", "row", "instance"), [
        (str(v["step"]), "done" if v["done"] else "to come", str(v["rank"]), str(v["row"]), str(v["instance"]))
        for v in visits[:SHOWN_ROWS]
    ])  # fmt: skip
    if len(visits) > SHOWN_ROWS:
        print(f"... and {len(visits) - SHOWN_ROWS} more; --json lists all")


def _visits(history: History, newest: Mixture, args: argparse.Namespace) -> Iterator[tuple[int, Visit, int]]:
    """(start of the document, visit, rank) for each attempt, with its own order and number of processes."""
    from olmo_train.data.inspect import find_documents, rows_per_rank, visits_of

    ends = [attempt.first_step - 1 for attempt in history.attempts[1:]] + [history.steps]
    for i, (attempt, end) in enumerate(zip(history.attempts, ends, strict=True)):
        same = attempt.config.data is history.config.data and attempt.batches == newest.batches
        mixture = newest if same else attempt.mixture()
        world_size = _world_size(attempt, args)
        first = attempt.first_step if i else 1  # a branch has read the same data before
        source, documents = find_documents(mixture, args.document)
        for document in documents:
            for visit in visits_of(mixture, source, document, first, end):
                yield document.start, visit, visit.row // rows_per_rank(mixture.batches.at(visit.step), world_size)

"""turn text (JSONL, Parquet, Arrow, text files, folders) into token shards"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

from olmo_train.formats import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize text into a source folder for training. The same command again continues after an interruption; "
        "a finished folder is left as it is."
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="JSONL (also .gz, .zst), Parquet, Arrow, a text file (one document), a folder of these, a saved data set",
    )  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the source folder to write")
    parser.add_argument(
        "--tokenizer", required=True, metavar="NAME_OR_FILE",
        help="a tokenizer.json, or an OLMo tokenizer by name: allenai_gpt-neox-olmo-dolma-v1_5 (OLMo 1), allenai_dolma2 (OLMo 2)",
    )  # fmt: skip
    what = "the token that ends a document, such as <|eot_id|> (default: as the tokenizer's folder says)"
    parser.add_argument("--eos", metavar="TOKEN", help=what)
    parser.add_argument("--text-field", default="text", help="field of a record that holds its text (default: text)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    parser.add_argument("--max-shard-tokens", type=int, default=2**28, help="most tokens of a shard (default: 2^28)")
    parser.add_argument(
        "--validation-fraction", type=float, metavar="F",
        help="hold out every round(1/F)-th document as the source folder DIR/validation",
    )  # fmt: skip
    parser.add_argument(
        "--on-error", default="skip", choices=("skip", "stop"),
        help="what a corrupt record does: it is named, counted and left out (default), or ends the command",
    )  # fmt: skip
    parser.add_argument(
        "--template", metavar="NAME",
        help="how prompts and messages are written: plain, olmo, chatml, smollm2, llama3, gemma; only the assistant is scored",
    )  # fmt: skip
    parser.add_argument("--instruction", metavar="TEXT", help="text before each prompt, with an empty line between")
    parser.add_argument(
        "--pack", type=int, metavar="N",
        help="fill windows of N tokens, the run's model.seq_len, with whole documents; needs data.document_mask: true",
    )  # fmt: skip
    what = "prompt: shorten prompts until their documents fit in --pack (default: such documents are left out)"
    parser.add_argument("--cut", choices=("prompt",), help=what)


def run(args: argparse.Namespace) -> int | None:
    from olmo_train.data.prepare.prepare import PrepareOptions, prepare

    options = PrepareOptions(tuple(args.inputs), **{f.name: getattr(args, f.name) for f in fields(PrepareOptions)[1:]})
    started = time.monotonic()
    with _ProgressLine() as line:
        result = prepare(options, line.update, line.warn)
    _report(args.output, result, time.monotonic() - started, line.new_tokens)


def _report(output: Path, result, seconds: float, new_tokens: int) -> None:
    meta = result.meta
    if result.already_finished:
        print(f"{output} is finished already; there is nothing to do")
    _line(output, meta)
    if result.validation:
        _line(output / "validation", result.validation)
    _print_account(meta)
    if not result.already_finished:
        print(f"{new_tokens / max(seconds, 1e-9):,.0f} tokens/s over {seconds:.1f} s")


def _print_account(meta) -> None:
    if not meta.account:  # written by an earlier version
        return
    read, written = meta.account["in"], meta.account["out"]
    print(f"read: {counted(read['files'], 'file')}, {counted(read['records'], 'record')}, {read['bytes']:,} bytes")
    print(f"tokenized: {counted(written['documents'], 'record')}, {written['bytes']:,} bytes, into {written['tokens']:,} tokens")
    for reason, n in meta.account["left_out"].items():
        print(f"left out: {counted(n['records'], 'record')}, {n['bytes']:,} bytes: {reason}")
    if "cut_prompts" in meta.account:
        print(f"prompts cut to fit in --pack {meta.pack}: {meta.account['cut_prompts']:,}")
    if meta.skipped["first"]:
        print(f"meta.json names the first {len(meta.skipped['first'])} of them")


def _line(folder: Path, meta) -> None:
    padding = f" + {meta.padding:,} of padding" if meta.pack else ""
    print(
        f"{folder}: {meta.tokens:,} tokens = {meta.tokens - meta.documents - meta.padding:,} of "
        f"{counted(meta.documents, 'document')} ({meta.bytes:,} bytes) + {meta.documents:,} EOS{padding}, {meta.dtype}, "
        f"{counted(len(meta.shards), 'shard')}"
    )
    if meta.pack:
        windows = (meta.tokens - 1) // meta.pack
        print(f"{counted(windows, 'window')} of {meta.pack} tokens, {1 - (meta.padding - 1) / (windows * meta.pack):.1%} filled; "
              f"train with model.seq_len={meta.pack} data.document_mask=true")  # fmt: skip


class _ProgressLine:
    """A bar on a terminal, a plain line every ten seconds elsewhere; both on stderr."""

    def __init__(self):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from olmo_train.log.console import is_terminal, rich_console

        self.console = rich_console(stderr=True, soft_wrap=True)
        columns = ("{task.percentage:>3.0f}%", "{task.fields[tokens]:,} tokens", "{task.fields[speed]:,.0f} tokens/s")
        parts = (BarColumn(), *map(TextColumn, columns), TimeRemainingColumn())
        self.bar = Progress(*parts, console=self.console, disable=not is_terminal(sys.stderr))
        self.started = self.printed = time.monotonic()
        self.new_tokens = 0

    def __enter__(self) -> _ProgressLine:
        self.bar.start()
        self.task = self.bar.add_task("", total=None, tokens=0, speed=0.0)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def warn(self, text: str) -> None:
        self.console.print(f"WARNING: {text}")

    def update(self, progress) -> None:
        now = time.monotonic()
        self.new_tokens = progress.tokens - progress.resumed_tokens
        speed = self.new_tokens / max(now - self.started, 1e-9)
        self.bar.update(
            self.task, completed=progress.input_bytes, total=progress.total_bytes, tokens=progress.tokens, speed=speed
        )
        if self.bar.disable and now - self.printed > 10:
            self.printed = now
            share = progress.input_bytes / max(progress.total_bytes, 1)
            left = (now - self.started) * (1 - share) / max(share, 1e-9)
            print(
                f"{share:4.0%}  {progress.tokens:,} tokens  {speed:,.0f} tokens/s  {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

"""train a byte-level BPE tokenizer on your own text"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from olmo_train.formats import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a tokenizer and write it as a tokenizer.json. The same text makes the same file."
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text, as for prepare-data")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="most ids, special tokens included (default: 4096)")
    parser.add_argument("--text-field", default="text", help="field of a record that holds its text (default: text)")


def run(args: argparse.Namespace) -> int | None:
    from olmo_train.data.prepare.chunks import Skipped
    from olmo_train.data.prepare.inputs import read_texts
    from olmo_train.data.prepare.prepare import NAMED
    from olmo_train.data.tokenizer import EOS_TEXT, save_tokenizer, train_tokenizer

    left_out: Counter[tuple[str, str]] = Counter()  # records or files, by (what they are, reason)

    def on_skip(skipped: Skipped) -> None:
        left_out["record", skipped.reason] += 1
        if left_out.total() <= NAMED:
            print(f"WARNING: {skipped.where}: {skipped.why}; left out", file=sys.stderr)

    def on_left_out(skipped: Skipped) -> None:
        if skipped.records:
            left_out["file", skipped.reason] += skipped.records
        if skipped.detail:
            print(f"WARNING: {skipped.where}: {skipped.why}", file=sys.stderr)

    tokenizer = train_tokenizer(read_texts(args.inputs, args.text_field, on_skip, on_left_out), args.vocab_size)
    save_tokenizer(tokenizer, args.output)
    print(f"{args.output}: {tokenizer.get_vocab_size():,} ids, EOS {EOS_TEXT} is id {tokenizer.token_to_id(EOS_TEXT)}")
    for (what, reason), n in left_out.items():
        print(f"left out: {counted(n, what)}: {reason}")

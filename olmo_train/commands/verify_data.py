"""check a source folder against its own hashes, spans and tokenizer"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from olmo_train.formats import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check sizes, hashes, token ids, the EOS after each document, label masks and the tokenizer of a folder that "
        "prepare-data wrote, and of its validation folder. Every problem is named with file, offset, expected and found."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a source folder")


def run(args: argparse.Namespace) -> int | None:
    from olmo_train.data.meta import PREPARE_AGAIN
    from olmo_train.data.prepare.prepare import VALIDATION
    from olmo_train.data.verify import Problem, verify
    from olmo_train.errors import DataError

    problems: list[Problem] = []
    held_out = args.folder / VALIDATION
    for folder in [args.folder, *([held_out] if held_out.is_dir() else [])]:
        meta, found = verify(folder, lambda name, folder=folder: print(f"checking {folder / name}", file=sys.stderr))
        problems += found
        if not found:
            documents, shards = counted(meta.documents, "document"), counted(len(meta.shards), "shard")
            packed = f" in windows of {meta.pack}, {meta.padding:,} of them padding," if meta.pack else ""
            written = f", template {meta.template['name']}" if meta.template else ""
            print(f"{folder}: {meta.tokens:,} tokens{packed} in {documents} and {shards}{written}, all verified")
    for problem in problems[1:]:
        print(f"problem: {problem.file}: {problem.what}", file=sys.stderr)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DataError(problems[0].file, f"{problems[0].what}; {PREPARE_AGAIN}{more}")

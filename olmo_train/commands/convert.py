"""take checkpoints to and from transformers folders and OLMo checkpoints"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("direction", choices=("export-hf", "import-hf", "import-olmo"))
    parser.add_argument("source", type=Path, metavar="SOURCE", help="export-hf: a checkpoint folder, or a run_dir for its newest")
    parser.add_argument("dest", type=Path, metavar="DEST", help="a new folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="export-hf: of the weights written (default: fp32)")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FILE", help="export-hf: instead of the checkpoint's own tokenizer.json")


def run(args: argparse.Namespace) -> None:
    from olmo_train import convert
    from olmo_train.data.tokenizer import load_tokenizer
    from olmo_train.errors import ConfigError

    for option in ("dtype", "tokenizer"):
        if getattr(args, option) is not None and args.direction != "export-hf":
            raise ConfigError(f"--{option}", f"goes with export-hf, not with {args.direction}")
    if args.direction == "export-hf":
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
        proof = convert.export_hf(args.source, args.dest, args.dtype or "fp32", tokenizer)
    elif args.direction == "import-hf":
        proof = convert.import_hf(args.source, args.dest)
    print(f"{args.dest}: {proof}")

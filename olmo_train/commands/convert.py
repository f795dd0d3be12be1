"""convert checkpoints to and from transformers folders and OLMo checkpoints"""

from __future__ import annotations

import argparse
from pathlib import Path

from olmo_train.commands.common import add_allow_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("direction", choices=("export-hf", "import-hf", "import-olmo"))
    parser.add_argument("source", type=Path, metavar="SOURCE", help="export-hf: a checkpoint folder, or a run_dir for its newest")
    parser.add_argument("dest", type=Path, metavar="DEST", help="a new folder; import-olmo of a YAML file: a new YAML file")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="export-hf: of the weights written (default: fp32)")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FILE", help="export-hf: instead of the checkpoint's own tokenizer.json")
    add_allow_argument(parser)
    what = "import-olmo: an option of OLMo to train without"
    parser.add_argument("--leave-out", action="append", default=[], metavar="KEY", help=what)
    parser.add_argument("--step", type=int, metavar="N", help="import-olmo: continue after this step (default: as the files say)")


def run(args: argparse.Namespace) -> None:
    from olmo_train.convert import hf, olmo
    from olmo_train.data.tokenizer import load_tokenizer
    from olmo_train.errors import ConfigError

    for option, direction in (
        ("dtype", "export-hf"),
        ("tokenizer", "export-hf"),
        ("eos", "export-hf"),
        ("allow_other_tokenizer", "export-hf"),
        ("leave_out", "import-olmo"),
        ("step", "import-olmo"),
    ):
        if getattr(args, option) not in (None, [], False) and args.direction != direction:
            raise ConfigError(f"--{option.replace('_', '-')}", f"goes with {direction}, not with {args.direction}")
    if args.direction == "import-olmo":
        step = olmo.import_olmo(args.source, args.dest, tuple(args.leave_out), args.step)
        print(f"{args.dest}: {f'resume_from continues after step {step}' if args.dest.is_dir() else 'written'}")
        return
    if args.direction == "export-hf":
        tokenizer = load_tokenizer(args.tokenizer, eos=args.eos) if args.tokenizer else None
        if args.eos and not tokenizer:
            raise ConfigError("--eos", "goes with --tokenizer; without it the checkpoint's own tokenizer and EOS are taken")
        check = not args.allow_other_tokenizer
        proof = hf.export_hf(args.source, args.dest, args.dtype or "fp32", tokenizer, check)
    else:
        proof = hf.import_hf(args.source, args.dest)
    print(f"{args.dest}: {proof}")

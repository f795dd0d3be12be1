"""convert checkpoints to and from transformers and PEFT folders, and from OLMo; merge adapters into their base"""

from __future__ import annotations

import argparse
from pathlib import Path

from olmo_train.commands.common import add_allow_argument

OPTIONS = {  # the directions that an option goes with
    "dtype": ("export-hf", "import-peft"),
    "tokenizer": ("export-hf",),
    "eos": ("export-hf",),
    "allow_other_tokenizer": ("export-hf",),
    "base": ("import-peft", "merge", "export-hf", "export-peft"),
    "base_name": ("export-peft",),
    "leave_out": ("import-olmo",),
    "step": ("import-olmo",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = ("export-hf", "import-hf", "import-olmo", "merge", "export-peft", "import-peft")
    parser.add_argument("direction", choices=directions, help="merge and export-peft: of a run with adapters")
    what = "export and merge: a checkpoint folder, or a run_dir for its newest; import: a folder of the other format"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=what)
    parser.add_argument("dest", type=Path, metavar="DEST", help="a new folder; import-olmo of a YAML file: a new YAML file")
    what = "export-hf: of the weights written; import-peft: of the frozen weights, as the adapters were trained (default: fp32)"
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help=what)
    parser.add_argument("--tokenizer", metavar="NAME_OR_FILE", help="export-hf: instead of the checkpoint's own tokenizer.json")
    add_allow_argument(parser)
    what = "import-peft: the checkpoint that the adapters were trained beside; merge and exports: where it is now, if it moved"
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help=what)
    what = "export-peft: the base's name or folder, for base_model_name_or_path"
    parser.add_argument("--base-name", metavar="NAME", help=what)
    what = "import-olmo: an option of OLMo to train without"
    parser.add_argument("--leave-out", action="append", default=[], metavar="KEY", help=what)
    parser.add_argument("--step", type=int, metavar="N", help="import-olmo: continue after this step (default: as the files say)")


def run(args: argparse.Namespace) -> None:
    from olmo_train.convert import hf, olmo, peft
    from olmo_train.errors import ConfigError

    for option, directions in OPTIONS.items():
        if getattr(args, option) not in (None, [], False) and args.direction not in directions:
            raise ConfigError(f"--{option.replace('_', '-')}", f"goes with {', '.join(directions)}, not with {args.direction}")
    if args.direction == "import-olmo":
        step = olmo.import_olmo(args.source, args.dest, tuple(args.leave_out), args.step)
        print(f"{args.dest}: {f'resume_from continues after step {step}' if args.dest.is_dir() else 'written'}")
        return
    if args.direction == "import-peft" and args.base is None:
        raise ConfigError("--base", "is missing: a PEFT folder holds adapters alone; name the checkpoint of their base")
    proof = {
        "export-hf": lambda: _export_hf(args),
        "import-hf": lambda: hf.import_hf(args.source, args.dest),
        "merge": lambda: peft.merge(args.source, args.dest, args.base),
        "export-peft": lambda: peft.export_peft(args.source, args.dest, args.base_name, args.base),
        "import-peft": lambda: peft.import_peft(args.source, args.dest, args.base, args.dtype or "fp32"),
    }[args.direction]()
    print(f"{args.dest}: {proof}")
    if args.direction == "export-peft":
        print(peft.how_to_load(args.source))


def _export_hf(args: argparse.Namespace) -> object:
    from olmo_train.convert import hf
    from olmo_train.data.tokenizer import load_tokenizer
    from olmo_train.errors import ConfigError

    tokenizer = load_tokenizer(args.tokenizer, eos=args.eos) if args.tokenizer else None
    if args.eos and not tokenizer:
        raise ConfigError("--eos", "goes with --tokenizer; without it the checkpoint's own tokenizer and EOS are taken")
    return hf.export_hf(args.source, args.dest, args.dtype or "fp32", tokenizer, not args.allow_other_tokenizer, args.base)

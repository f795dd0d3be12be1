"""The command line: a list of verbs, each a module of commands/ that is imported only when it is called."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys
from typing import NoReturn

VERBS = {
    "train": "train a model, or go on with a run",
    "train-tokenizer": "make a tokenizer from text",
    "prepare-data": "turn text into memory-mapped token shards",
    "verify-data": "check prepared data against its hashes",
    "inspect-data": "show what a step trains on, or which steps see a document",
    "plan": "tell memory, time, energy and schedule before a launch",
    "curves": "draw the curves of runs: page, picture or terminal",
    "checkpoints": "list, verify or prune the checkpoints of a run",
    "replay": "compute a logged step again and compare it, bit for bit",
    "doctor": "look for what would keep a run from working on this machine",
    "bench": "measure how fast a configuration trains on this machine",
    "evaluate": "measure a checkpoint on held-out text",
    "convert": "take checkpoints to and from transformers folders and OLMo checkpoints",
    "generate": "continue a text with a checkpoint",
}


class Parser(argparse.ArgumentParser):
    """Tells a wrong use as every other mistake is told: usage, then one `error:` line, from rank 0 alone."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", 0)) == 0:
            self.print_usage(sys.stderr)
            print(f"error: {self.prog}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def let_threads_sleep() -> None:
    """Threads of a CPU that wait for each other by spinning take the cores from whoever else runs: another process, or code
    with threads of its own, as what torch.compile makes. Call it before torch is loaded; the user's own setting comes first."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def look_for_garbage_rarely() -> None:
    """Loading torch makes 300,000 objects that stay. Looked through again and again, at Python's own pace, they cost a sixth
    of the loading."""
    gc.set_threshold(50_000)


def main(words: list[str] | None = None) -> int:
    """Run one verb; gives its exit code. A UserError becomes one line on stderr, from rank 0 alone."""
    words = sys.argv[1:] if words is None else words
    let_threads_sleep()
    look_for_garbage_rarely()
    parser = Parser(prog="olmo-train", description="Pretrain OLMo-style language models.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if words and words[0] == name:
            module = importlib.import_module(f"olmo_train.commands.{name.replace('-', '_')}")
            module.add_arguments(verb)
    arguments, rest = parser.parse_known_args(words)
    if rest:  # key=value words behind an option: argparse leaves them over
        if not hasattr(arguments, "config") or not all("=" in word and not word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.config += rest
    return _run(importlib.import_module(f"olmo_train.commands.{arguments.verb.replace('-', '_')}").run, arguments)


def _run(verb, arguments: argparse.Namespace) -> int:
    from olmo_train.errors import UserError

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return verb(arguments) or 0
    except UserError as problem:
        if arguments.debug:
            raise
        if int(os.environ.get("RANK", 0)) == 0 or problem.speaks:
            print(f"error: {' '.join(str(problem).split())}", file=sys.stderr, flush=True)
        return problem.exit_code
    except BrokenPipeError:  # `olmo-train ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: a list of verbs. Each is a module of commands/, imported only when it is called."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from olmo_train import __version__
from olmo_train.commands import completion
from olmo_train.errors import ConfigError, DataError, UserError, did_you_mean, near, near_keys, nearest, reason
from olmo_train.parallel.processes import rank

VERBS = {
    "train": "train a model, or resume a run",
    "train-tokenizer": "make a tokenizer from text",
    "prepare-data": "turn text into memory-mapped token shards",
    "verify-data": "check prepared data against its hashes",
    "inspect-data": "show what a step trains on, or which steps see a document",
    "config": "print the complete configuration of a run, with its defaults",
    "sweep": "train with several values of some keys, and compare the losses",
    "ladder": "train small models, fit their losses, and forecast that of a larger one",
    "plan": "estimate memory, time, energy and schedule before a launch",
    "curves": "draw the curves of runs: page, picture or terminal",
    "checkpoints": "list, verify, prune or merge the checkpoints of a run",
    "replay": "compute a logged step again and compare it, bit for bit",
    "doctor": "check this machine for problems that would stop a run",
    "bench": "measure how fast a configuration trains on this machine",
    "evaluate": "measure a checkpoint on held-out text",
    "convert": "take checkpoints to and from transformers, PEFT and OLMo, and merge adapters",
    "generate": "continue a text with a checkpoint",
}
EXAMPLES = {  # one for each verb, at the end of its --help; together they are a first day with your own text
    "train": "train my-run.yaml run_dir=runs/first optim.peak_lr=1e-3",
    "train-tokenizer": "train-tokenizer my-text/ --output data/tokenizer.json --vocab-size 4096",
    "prepare-data": "prepare-data my-text/ --output data/mine --tokenizer data/tokenizer.json --validation-fraction 0.05",
    "verify-data": "verify-data data/mine",
    "inspect-data": "inspect-data runs/first --step 10",
    "config": "config my-run.yaml optim.peak_lr=1e-3",
    "sweep": "sweep my-run.yaml run_dir=runs/lr optim.peak_lr=1e-3,3e-3 --seeds 3 --print",
    "ladder": "ladder my-run.yaml run_dir=runs/ladder --sizes 64x2,96x3,128x4 --multiples 1,2,4 --print",
    "plan": "plan configs/models/olmo-1b.yaml --gpus 8 --gpu h100",
    "curves": "curves runs/first --output curves.html",
    "checkpoints": "checkpoints runs/first --verify",
    "replay": "replay runs/first --step 10",
    "doctor": "doctor my-run.yaml",
    "bench": "bench my-run.yaml --steps 5",
    "evaluate": "evaluate runs/first",
    "convert": "convert export-hf runs/first exported",
    "generate": "generate runs/first --prompt 'Once upon a time'",
}
OF_A_GROUP = ("train", "bench", "replay")  # verbs that many processes run together; rank 0 reports errors
OUTPUTS = {"output": "--output", "dest": "DEST"}  # arguments that name what a verb writes
PROCESSES = ("gpus", "num-gpus", "ngpus", "devices", "nproc", "nproc-per-node", "nproc_per_node", "world-size")  # not of train
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


class Parser(argparse.ArgumentParser):
    """Reports usage errors in the same form as all others: usage, then one `error:` line, from rank 0 only."""

    verb = ""  # the first word of the command line, also for the parsers of single verbs
    example = ""  # a command line that works
    words: Sequence[str] = ()  # what is parsed

    def parse_known_args(self, args=None, namespace=None):
        """An option that takes a TEXT takes the next word as it is: argparse reads `--prompt -x` as two options."""
        self.words = list(sys.argv[1:] if args is None else args)
        words = iter(self.words)
        joined = []
        for word in words:
            action = self._option_string_actions.get(word)
            text = next(words, None) if action and action.metavar == "TEXT" else None
            joined.append(word if text is None else f"{word}={text}")
        return super().parse_known_args(joined, namespace)

    def format_help(self) -> str:
        """The example is not wrapped, so that it can be pasted."""
        return super().format_help() + (f"\nexample:\n  {self.example}\n" if self.example else "")

    def options_like(self, flag: str) -> list[str]:
        """The option that is spelled most like an unknown one; none for an option that exists or is the start of one."""
        name, options = flag.partition("=")[0], self._option_string_actions
        return [] if any(option.startswith(name) for option in options) else near(name, options.keys() - {"-h", "--help"})[:1]

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} is not a choice; {nearest(value, action.choices)}")

    def error(self, message: str) -> NoReturn:
        """Print the usage and the mistake with its remedy, and exit with code 2."""
        if "required: " in message:
            meant = [option for word in self.words if word.startswith("--") for option in self.options_like(word)]
            message += f"; {did_you_mean(meant, f'for example: {self.example}')}"
        if not _is_silent(self.verb):
            if self.words:
                self.print_usage(sys.stderr)
            else:
                self.print_help()
            print(f"error: {self.prog}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def look_for_garbage_rarely() -> None:
    """Pause garbage collection while torch loads: it creates 300,000 permanent objects, and scanning them repeatedly takes a
    sixth of the load time."""
    gc.set_threshold(50_000)


def main(words: list[str] | None = None) -> int:
    """Run one verb; returns its exit code. An error that a user can cause becomes one line on stderr, from rank 0 only."""
    words = sys.argv[1:] if words is None else words
    open_streams()
    try:
        code = _run(*_parse(words))
    except KeyboardInterrupt:
        verb = "".join(words[:1])
        print(
            f"error: {verb}: interrupted{'; the same command continues' * (verb == 'prepare-data')}", file=sys.stderr, flush=True
        )
        code = INTERRUPTED
    except Exception:
        if not _is_joined():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    code = _flush_stdout(code)
    if _is_joined():  # Python's own exit may wait for NCCL, and so for ranks that do not have this error
        sys.stderr.flush()
        os._exit(code)
    return code


def open_streams() -> None:
    """Make stdin, stdout and stderr safe to use. A closed one (`>&-`) reads and writes nothing; else the next file that is
    opened would take its place. A character that the terminal's encoding lacks is printed as its escape."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _parse(words: list[str]) -> tuple[Callable[[argparse.Namespace], int | None], argparse.Namespace]:
    """The verb's function and its arguments."""
    Parser.verb = "".join(words[:1])
    look_for_garbage_rarely()
    if (typed := completion.typed_words()) is not None:
        completion.complete(_make_parser(typed)[0])
    parser, verbs = _make_parser(words)
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        meant = nearest(words[0], [*VERBS, "--help", "--version"])
        if words[0].endswith((".yaml", ".yml")) or "=" in words[0]:
            meant = did_you_mean([f"olmo-train train {words[0]}"])
        parser.error(f"{words[0]!r} is not a verb; {meant}")
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            why = f"is not text in this locale's encoding, {sys.getfilesystemencoding()}"
            parser.error(f"{ascii(word)} {why}; rename the file, or use a UTF-8 locale")
    arguments, rest = parser.parse_known_args(words)
    if rest:  # key=value words after an option, which argparse does not take
        if not hasattr(arguments, "config") or not all("=" in word and not word.startswith("-") for word in rest):
            verb = verbs[arguments.verb]
            verb.error(f"unrecognized arguments: {' '.join(rest)}; {_meant(words, rest[0], verb, arguments)}")
        arguments.config += rest
    return importlib.import_module(f"olmo_train.commands.{arguments.verb.replace('-', '_')}").run, arguments


def _make_parser(words: list[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and that of each verb; only the verb that `words` begin with has its arguments."""
    parser = Parser(prog="olmo-train", description="Pretrain OLMo-style language models.")
    parser.example, parser.words = f"olmo-train {EXAMPLES['train']}", words
    parser.add_argument("--version", action="version", version=f"olmo-train {__version__}")
    parser.add_argument("--completion", action=completion.PrintScript, help="print the script for bash, zsh or fish")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        verb.example = f"olmo-train {EXAMPLES[name]}"
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if words and words[0] == name:
            module = importlib.import_module(f"olmo_train.commands.{name.replace('-', '_')}")
            module.add_arguments(verb)
    return parser, verbs.choices


def _meant(words: list[str], flag: str, verb: Parser, arguments: argparse.Namespace) -> str:
    """What to type instead of an unknown option: one spelled like it, or the key of a configuration as KEY=VALUE."""
    if options := verb.options_like(flag):
        return did_you_mean(options)
    name, _, value = flag.lstrip("-").partition("=")
    if arguments.verb == "train" and name in PROCESSES:
        return (
            "launch/local.sh CONFIG.yaml trains on all GPUs of this machine, NPROC=2 launch/local.sh CONFIG.yaml in 2 processes"
        )
    if flag.startswith("-") and hasattr(arguments, "config"):
        from olmo_train.train_config import keys

        if found := near_keys(name.replace("-", "_"), [key.name for key in keys()]):
            behind = words[words.index(flag) + 1 :][:1]
            return did_you_mean([f"{found[0]}={value or ''.join(behind) or 'VALUE'}"])
    return f"`olmo-train {arguments.verb} --help` lists the options"


def _run(verb: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    from olmo_train.guards.signals import acknowledged_interrupt

    try:
        with acknowledged_interrupt():
            return verb(arguments) or 0
    except (UserError, OSError, UnicodeEncodeError) as problem:
        if isinstance(problem, OSError) and _stdout_failed(problem):
            return 0  # as _flush_stdout sees it
        if arguments.debug:
            raise
        error = problem if isinstance(problem, UserError) else as_user_error(problem, arguments)
        if error.speaks or not _is_silent(arguments.verb):
            print(f"{error.label}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code


def _is_joined() -> bool:
    """Whether this process is still in a group: an error kept it from leaving."""
    world = sys.modules.get("olmo_train.parallel.world")  # absent: this verb needs no torch
    return world is not None and world.is_joined()


def _is_silent(verb: str) -> bool:
    """Whether another process, rank 0 of the same group, reports the errors of this one."""
    return verb in OF_A_GROUP and rank() > 0


def as_user_error(problem: OSError | UnicodeEncodeError, arguments: argparse.Namespace) -> UserError:
    """The one-line error for an output that cannot be written, or for data that cannot be read."""
    if isinstance(problem, UnicodeEncodeError):
        text = ascii(problem.object[max(0, problem.start - 100) : problem.end + 100])
        return DataError(text, f"cannot be written as {problem.encoding}; rename the file, or use a UTF-8 locale")
    files = [os.path.abspath(os.fsdecode(n)) for n in (problem.filename, problem.filename2) if isinstance(n, str | bytes)]
    for argument, option in OUTPUTS.items():
        named = getattr(arguments, argument, None)
        if named and (problem.errno == errno.ENOSPC or any(_is_of(Path(file), Path(os.path.abspath(named))) for file in files)):
            return ConfigError(option, f"{named} cannot be written: {problem.strerror}; name another place")
    if not files:
        return UserError(arguments.verb, f"{reason(problem)}; --debug shows where")
    return DataError(problem.filename2 or problem.filename, f"{problem.strerror}; name another file, or change its permissions")


def _is_of(file: Path, output: Path) -> bool:
    """Whether a file belongs to an output: in it, a folder above it, or the temporary file that becomes it."""
    becomes = file.parent == output.parent and file.name.startswith(f".{output.name}.") and file.name.endswith(".tmp")
    return file.is_relative_to(output) or output.is_relative_to(file) or becomes


def _stdout_failed(problem: OSError) -> bool:
    """Whether an error comes from printing: then text is still in the buffer, or the reader of the pipe is gone."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    if not isinstance(problem, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _flush_stdout(code: int) -> int:
    """Flush stdout before Python exits, where errors could not be reported. A closed pipe (`| head`) is not an error."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(problem, BrokenPipeError):
            print(f"error: stdout: cannot be written: {problem.strerror}", file=sys.stderr, flush=True)
            return code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())

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
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from olmo_train.errors import ConfigError, DataError, UserError
from olmo_train.parallel.processes import rank

VERBS = {
    "train": "train a model, or resume a run",
    "train-tokenizer": "make a tokenizer from text",
    "prepare-data": "turn text into memory-mapped token shards",
    "verify-data": "check prepared data against its hashes",
    "inspect-data": "show what a step trains on, or which steps see a document",
    "config": "print the complete configuration of a run, with its defaults",
    "plan": "estimate memory, time, energy and schedule before a launch",
    "curves": "draw the curves of runs: page, picture or terminal",
    "checkpoints": "list, verify or prune the checkpoints of a run",
    "replay": "compute a logged step again and compare it, bit for bit",
    "doctor": "check this machine for problems that would stop a run",
    "bench": "measure how fast a configuration trains on this machine",
    "evaluate": "measure a checkpoint on held-out text",
    "convert": "take checkpoints to and from transformers folders and OLMo checkpoints",
    "generate": "continue a text with a checkpoint",
}
OF_A_GROUP = ("train", "bench", "replay")  # verbs that many processes run together; rank 0 reports errors
OUTPUTS = {"output": "--output", "dest": "DEST"}  # arguments that name what a verb writes
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


class Parser(argparse.ArgumentParser):
    """Reports usage errors in the same form as all others: usage, then one `error:` line, from rank 0 only."""

    verb = ""  # the first word of the command line, also for the parsers of single verbs

    def parse_known_args(self, args=None, namespace=None):
        """An option that takes a TEXT takes the next word as it is: argparse reads `--prompt -x` as two options."""
        words = iter(sys.argv[1:] if args is None else args)
        joined = []
        for word in words:
            action = self._option_string_actions.get(word)
            text = next(words, None) if action and action.metavar == "TEXT" else None
            joined.append(word if text is None else f"{word}={text}")
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        if not _is_silent(self.verb):
            self.print_usage(sys.stderr)
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
    return _flush_stdout(code)


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
    parser = Parser(prog="olmo-train", description="Pretrain OLMo-style language models.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if words and words[0] == name:
            module = importlib.import_module(f"olmo_train.commands.{name.replace('-', '_')}")
            module.add_arguments(verb)
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            why = f"is not text in this locale's encoding, {sys.getfilesystemencoding()}"
            parser.error(f"{ascii(word)} {why}; rename the file, or use a UTF-8 locale")
    arguments, rest = parser.parse_known_args(words)
    if rest:  # key=value words after an option, which argparse does not take
        if not hasattr(arguments, "config") or not all("=" in word and not word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.config += rest
    return importlib.import_module(f"olmo_train.commands.{arguments.verb.replace('-', '_')}").run, arguments


def _run(verb: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return verb(arguments) or 0
    except (UserError, OSError, UnicodeEncodeError) as problem:
        if isinstance(problem, OSError) and _stdout_failed(problem):
            return 0  # as _flush_stdout sees it
        if arguments.debug:
            raise
        error = problem if isinstance(problem, UserError) else as_user_error(problem, arguments)
        if error.speaks or not _is_silent(arguments.verb):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code


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
        return UserError(arguments.verb, f"{problem}; --debug shows where")
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

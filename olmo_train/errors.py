"""The errors that a user can cause or meet, each with the exit code that scripts and schedulers act on.

A UserError's text is one line: what is wrong, the value, and the fix. The command line prints it as
`error: WHERE: text` without a traceback, or as `stopped: WHERE: text` after an orderly stop; any other exception is a bug in
this package and exits 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """Base of all errors that end in one line, which begins with `label`. `where` names a file or a dotted configuration key."""

    exit_code = 1
    label = "error"
    speaks = False  # print it on this rank too: rank 0 may be gone

    def __init__(self, where: object, what: str):
        super().__init__(f"{where}: {what}")
        self.where, self.what = where, what

    def __reduce__(self) -> tuple:  # so that it can be sent to other ranks
        return type(self), (self.where, self.what)


class ConfigError(UserError):  # configuration or usage
    exit_code = 2


class DataError(UserError):
    exit_code = 3


class CheckpointError(UserError):  # no loadable checkpoint
    exit_code = 4


class SaveError(UserError):  # a checkpoint could not be written
    exit_code = 1


class NonFiniteError(UserError):  # training stopped by non-finite values
    exit_code = 5


class ReplicaError(UserError):  # ranks that must hold the same bits do not
    exit_code = 1


class PeerError(UserError):  # a peer was lost or hung
    exit_code = 6


class Stopped(UserError):  # stopped by a signal after saving: the same command again resumes
    exit_code = 75
    label = "stopped"


def near(word: str, known: Iterable[str]) -> list[str]:
    """The known name that is spelled most like `word`, or up to three that contain it, the shortest first."""
    by_lower = {name.lower(): name for name in sorted(known, reverse=True)}
    word = word.lower()
    if close := difflib.get_close_matches(word, by_lower, n=1, cutoff=0.6):
        return [by_lower[close[0]]]
    parts = [name for name in by_lower if word in re.split(r"\W|_", name) or len(word) > 2 and word in name]
    return [by_lower[name] for name in sorted(parts, key=lambda name: (len(name), name))[:3]]


def did_you_mean(names: Iterable[str]) -> str:
    return f"did you mean {' or '.join(repr(name) for name in names)}?"


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'cosine'?`, or the list of what is known when nothing is near."""
    known = sorted(known)
    names = near(word, known)
    return did_you_mean(names) if names else "known: " + ", ".join(known)


def check_choice(where: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that names no row of its table. Raises ConfigError with the nearest row."""
    if value not in known:
        raise ConfigError(where, f"'{value}' is not a choice; {nearest(str(value), known)}")

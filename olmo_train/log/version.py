"""The version of the code: the git commit, and whether it was modified."""

from __future__ import annotations

import subprocess
from pathlib import Path


def code_version() -> str | None:
    """The commit of the code that trains, with `+changes` when files differ from it; None outside a checkout."""
    try:
        changes = "+changes" if _git("status", "--porcelain", "-uno", ".") else ""
        return _git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    where = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, errors="replace", check=True, timeout=10)
    return done.stdout.strip()

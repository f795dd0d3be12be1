"""Paths with a scheme (s3://, gs://, https://): downloaded into a cache folder, verified, then read like any file.

A download gets its final name only after its size (from the server) and its hash (from meta.json, if there is one) match.
Cached files are not downloaded again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from olmo_train.data.meta import META_FILE, TOKENIZER_FILE, hash_file, read_meta
from olmo_train.errors import ConfigError, DataError
from olmo_train.storage import cache_folder

FILE_SUFFIXES = (".npy", ".bin")  # a remote path that ends otherwise is a prepared folder


def localize(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The same path with everything remote replaced by its copy in the cache, which is fetched when it is not there.

    Raises DataError when a file cannot be downloaded, or its size or hash is not the expected one.
    """
    if not isinstance(path, str):
        return tuple(str(localize(word)) for word in path)
    if "://" not in path:
        return path
    if not path.endswith(FILE_SUFFIXES):
        return str(_fetch_source(path.rstrip("/")))
    if any(letter in path for letter in "*?["):
        return tuple(str(_fetch(url)) for url in _glob(path))
    return str(_fetch(path))


def _fetch_source(url: str) -> Path:
    """A prepared folder: meta.json every time, as it may have changed, then the files it lists."""
    folder = _place(f"{url}/{META_FILE}").parent
    _fetch(f"{url}/{META_FILE}", refresh=True)
    meta = read_meta(folder)
    hashes = {TOKENIZER_FILE: meta.tokenizer_sha256, "documents.parquet": meta.documents_sha256, "documents.ids": None}
    for shard in meta.shards:
        hashes[shard.file] = shard.sha256
        if shard.labels:
            hashes[shard.labels["file"]] = shard.labels["sha256"]
    for name, sha256 in hashes.items():
        _fetch(f"{url}/{name}", sha256)
    return folder


def _place(url: str) -> Path:
    """Where in the cache: a folder a remote folder, so that a source's files lie side by side."""
    parent, _, name = url.partition("?")[0].rpartition("/")
    return cache_folder() / "remote" / hashlib.sha256(parent.encode()).hexdigest()[:16] / PurePosixPath(name).name


def _fetch(url: str, sha256: str | None = None, refresh: bool = False) -> Path:
    """The local copy of one file. Several processes may ask at once; one fetches, the others wait."""
    place = _place(url)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        if not refresh and place.exists() and _still_good(url, place, sha256):
            return place
        temporary = place.with_name(place.name + ".part")
        try:
            expected = _download(url, temporary)
            found = temporary.stat().st_size
            if expected is not None and found != expected:
                raise DataError(url, f"{found} bytes arrived of {expected}; run the same command again")
            digest = hash_file(temporary)
            if sha256 is not None and digest != sha256:
                raise DataError(url, f"sha256 is {digest}, {META_FILE} says {sha256}; the remote files do not belong together")
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
        _mark(place).write_text(digest, encoding="utf-8")
    return place


def _still_good(url: str, place: Path, sha256: str | None) -> bool:
    """Whether a cached copy still matches: by its hash, noted at download, or else by the size that the server reports."""
    if sha256 is not None:
        mark = _mark(place)
        return mark.exists() and mark.read_text(encoding="utf-8") == sha256
    try:
        with _open(url) as (_, size):
            pass
    except Exception:  # the server is away: the copy was checked when it came
        return True
    return size is None or size == place.stat().st_size


def _mark(place: Path) -> Path:
    return place.with_name(place.name + ".sha256")


def _open_filesystem(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as problem:
        raise ConfigError(url, "needs the package fsspec; pip install 'olmo-train[remote]'") from problem
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as problem:  # s3fs or gcsfs is missing, or the scheme is unknown
        raise ConfigError(url, f"cannot be opened: {problem}") from problem


@contextlib.contextmanager
def _open(url: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The remote file to read from, and its size if the server reports it. HTTP needs no package, the rest fsspec."""
    if url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=60) as response:
            size = response.headers.get("Content-Length")
            yield response, None if size is None else int(size)
    else:
        filesystem, path = _open_filesystem(url)
        with filesystem.open(path, "rb", block_size=2**23) as stream:
            yield stream, filesystem.size(path)


def _download(url: str, file: Path) -> int | None:
    """Copy to `file`; returns the size that the server reported, if it did."""
    try:
        with _open(url) as (source, expected), open(file, "wb") as target:
            shutil.copyfileobj(source, target, 2**23)
    except ConfigError:
        raise
    except Exception as problem:  # each filesystem raises different exceptions
        raise DataError(url, f"cannot be fetched: {type(problem).__name__}: {problem}") from problem
    return expected


def _glob(url: str) -> list[str]:
    if url.startswith("http"):
        raise ConfigError(url, "has a pattern, but HTTP cannot list files; name them one by one")
    filesystem, path = _open_filesystem(url)
    found = sorted(filesystem.glob(path))
    if not found:
        raise DataError(url, "matches no file")
    return [filesystem.unstrip_protocol(match) for match in found]


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    with open(place.with_name(place.name + ".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

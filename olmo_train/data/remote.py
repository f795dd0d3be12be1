"""Remote paths (s3://, gs://, https://): files are downloaded into a cache folder, verified, then read like local files.

A download gets its final name only after its size (from the server) and its hash (from meta.json, if there is one) match.
Cached files are not downloaded again. Libraries are imported where they are used: most runs read local files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from olmo_train.data.meta import META_FILE, TOKENIZER_FILE, hash_file, read_meta
from olmo_train.errors import ConfigError, DataError, reason
from olmo_train.storage import cache_folder, lock, replacing

log = logging.getLogger(__name__)
FILE_SUFFIXES = (".npy", ".bin")  # a remote path that ends otherwise is a prepared folder
PAUSES = (1, 5, 20)  # seconds before the second, third and fourth try of a download
NOT_FOUND = (400, 401, 403, 404, 410)  # HTTP codes of answers that do not change when asked again


def localize(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The same path with each remote part replaced by its local copy, which is downloaded if it is not in the cache.

    Raises ConfigError when a filesystem's package is missing, and DataError when a file cannot be downloaded or its size or
    hash is not the expected one.
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
    """A prepared folder: meta.json every time, as it may have changed, then the files that it lists."""
    folder = _fetch(f"{url}/{META_FILE}", refresh=True).parent
    meta = read_meta(folder)
    hashes = {TOKENIZER_FILE: meta.tokenizer_sha256, "documents.parquet": meta.documents_sha256, "documents.ids": None}
    for shard in meta.shards:
        hashes[shard.file] = shard.sha256
        if shard.labels:
            hashes[shard.labels["file"]] = shard.labels["sha256"]
    for name, sha256 in hashes.items():
        _fetch(f"{url}/{name}", sha256)
    return folder


def _fetch(url: str, sha256: str | None = None, refresh: bool = False) -> Path:
    """The local copy of one file. If several processes ask at once, one downloads and the others wait."""
    parent, _, name = url.partition("?")[0].rpartition("/")
    # One cache folder per remote folder, so that the files of a source are in the same folder.
    folder = cache_folder() / "remote" / hashlib.sha256(parent.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / PurePosixPath(name).name
    with lock(Path(f"{place}.lock")):
        if not refresh and place.exists() and _still_good(url, place, sha256):
            return place
        with replacing(place) as temporary:
            _download(url, temporary)
            digest = hash_file(temporary)
            if sha256 not in (None, digest):
                raise DataError(url, f"sha256 is {digest}, {META_FILE} says {sha256}; the remote files do not belong together")
        Path(f"{place}.sha256").write_text(digest, encoding="utf-8")
    return place


def _still_good(url: str, place: Path, sha256: str | None) -> bool:
    """Whether a cached copy matches: by its hash, noted at download, or else by the size that the server reports."""
    if sha256 is not None:
        noted = Path(f"{place}.sha256")
        return noted.exists() and noted.read_text(encoding="utf-8") == sha256
    try:
        with _open(url) as (_, size):
            return size in (None, place.stat().st_size)
    except Exception:  # the server cannot be reached; the copy was verified when it was downloaded
        return True


def _download(url: str, file: Path) -> None:
    """Copy a remote file to `file` and compare its size with the server's; tries again after PAUSES.

    Raises ConfigError and DataError.
    """
    for pause in (*PAUSES, None):
        try:
            with _open(url) as (source, expected), open(file, "wb") as target:
                shutil.copyfileobj(source, target, 2**23)
            found = file.stat().st_size
            if expected in (None, found):
                return
            problem = DataError(url, f"{found} bytes arrived of {expected}; run the same command again")
        except ConfigError:
            raise
        except Exception as error:  # each filesystem raises different exceptions
            problem = DataError(url, f"cannot be fetched: {type(error).__name__}: {error}")
            if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "code", None) in NOT_FOUND:
                raise problem from error
        if pause is None:
            raise problem
        log.warning("%s; next try in %d s", problem, pause)
        time.sleep(pause)


@contextlib.contextmanager
def _open(url: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The remote file to read from, and its size if the server reports it."""
    if url.startswith(("http://", "https://")):  # fsspec would need aiohttp for it
        import urllib.request

        with urllib.request.urlopen(url, timeout=60) as response:
            size = response.headers.get("Content-Length")
            yield response, None if size is None else int(size)
    else:
        filesystem, path = _open_filesystem(url)
        with filesystem.open(path, "rb", block_size=2**23) as stream:
            yield stream, filesystem.size(path)


def _open_filesystem(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it). Raises ConfigError when its package is missing or the scheme is unknown."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    try:
        return url_to_fs(url)
    except ImportError as problem:
        package = known_implementations[url.partition("://")[0]]["class"].partition(".")[0]
        install = "" if package == "fsspec" else f"; pip install {package}"
        raise ConfigError(url, f"cannot be opened: {reason(problem)}{install}") from problem
    except ValueError as problem:
        raise ConfigError(url, f"cannot be opened: {reason(problem)}") from problem


def _glob(url: str) -> list[str]:
    if url.startswith("http"):
        raise ConfigError(url, "has a pattern, but HTTP cannot list files; name them one by one")
    filesystem, path = _open_filesystem(url)
    found = sorted(filesystem.glob(path))
    if not found:
        raise DataError(url, "matches no file")
    return [filesystem.unstrip_protocol(match) for match in found]

"""Write files and folders atomically, so that after a crash each is complete or absent.

Write under another name, flush the file and its folder, rename, flush the parent. A folder with its final name is complete. Its
MANIFEST.json lists the size and hash of every file, taken from the bytes in memory before they were written, so that a later read
finds what the disk has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NewType

from olmo_train.errors import ConfigError, UserError

log = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
READ_BY_NAME = {"config.yaml", "state.json", "tokenizer.json"}  # files that are read from a checkpoint, besides *.safetensors
FilePath = NewType("FilePath", str)  # of a configuration: a leading ~ is the home folder; see config.py
CHUNK = 1 << 22  # bytes written, or read, and hashed at a time


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/olmo_train, by default ~/.cache/olmo_train; in the folder for temporary files for a user without a home.

    Raises ConfigError when another user could write to the latter: compiled code is loaded from it.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "olmo_train"
    try:
        return Path.home() / ".cache" / "olmo_train"
    except RuntimeError:  # no HOME, and no such user in /etc/passwd: a container started with a bare user id
        folder = Path(tempfile.gettempdir()) / f"olmo_train-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError("XDG_CACHE_HOME", f"is not set, and {folder} may belong to another user; set it to a folder of yours")
    return folder


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, *pieces: bytes | memoryview) -> dict[str, Any]:
    """Write the pieces to a file in order and flush it; returns its manifest entry."""
    return write_pieces(path, pieces)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], ahead: int | None = None) -> dict[str, Any]:
    """The same with pieces that are made while they are written: at most `ahead` chunks of them wait to be hashed.

    A thread hashes the bytes in memory at the same time; hashing takes about as long as writing and flushing.
    """
    digest, size = hashlib.sha256(), 0
    waiting: deque[Future] = deque()
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for chunk in _chunks(pieces):
            waiting.append(hasher.submit(digest.update, chunk))
            while ahead is not None and len(waiting) > ahead:
                waiting.popleft().result()
            size += len(chunk)
            while chunk:
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in chunks of about CHUNK: large pieces are cut, without a copy, and small ones are joined."""
    joined = bytearray()
    for piece in map(memoryview, pieces):
        if len(joined) + len(piece) <= CHUNK:
            joined += piece
            continue
        if joined:
            yield memoryview(joined)
        joined = bytearray()
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]
    if joined:
        yield memoryview(joined)


@contextlib.contextmanager
def replacing(path: Path, flushed: bool = True) -> Iterator[Path]:
    """Write a file atomically: the block writes to the yielded path, which then replaces `path`. A reader sees the old content
    or the new one, never a part of it; with `flushed` also after a power cut."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if flushed:
            flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if flushed:
        flush(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def temporary_folder(final: Path) -> Path:
    """An empty folder beside `final` to write its files in. commit_folder renames it."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    return temporary


def commit_folder(temporary: Path, final: Path, entries: dict[str, dict[str, Any]] | None = None, **about: Any) -> None:
    """Rename a folder of flushed files to `final`. `entries`: {file name: manifest entry}, of which a manifest is written, with
    `about` beside them."""
    if entries is not None:
        manifest = {"format": 1, "files": entries, **about}
        write_file(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    flush(temporary)
    os.rename(temporary, final)
    flush(final.parent)


def remove_folder(folder: Path) -> None:
    """Rename a folder and delete it, so that a crash never leaves a part of it under its name. Symlinks are not followed."""
    if folder.is_symlink():
        folder.unlink()
        return
    doomed = folder.with_name(f".{folder.name}.deleted") if not folder.name.startswith(".") else folder
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
    shutil.rmtree(doomed)


def hash_file(path: Path) -> str:
    """SHA-256 of the contents, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Expected = dict[str, tuple[int, str]]  # {file name: (size, hash)}, as in a manifest
FileCheck = Callable[[Path, Expected], dict[str, str]]  # folder, the files to check -> {file name: problem}


def check_files(folder: Path, expected: Expected, contents: bool = True) -> dict[str, str]:
    """{file name: problem} of the files that do not have the expected size and hash."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # one thread per file
        found = threads.map(lambda name: _problem_of(folder / name, name, *expected[name], contents), expected)
        return {name: problem for name, problem in zip(expected, found, strict=True) if problem}


def problems_of(folder: Path, contents: bool = True, check: FileCheck = check_files) -> list[str]:
    """The problems of a committed folder, file by file; empty if every file matches the manifest.

    A file that the manifest does not name is ignored, with a warning, unless a reader of checkpoints would open it. A link
    counts as the file that it points to. Without `contents`, names and sizes are compared, and no file is read. `check`
    compares the contents.
    """
    try:
        expected = _read_manifest(folder / MANIFEST)
        found = check_files(folder, expected, contents=False)
        if contents:
            found |= check(folder, {name: entry for name, entry in expected.items() if name not in found})
        problems = [found[name] for name in expected if name in found]
        present = {path.name: path.is_symlink() for path in folder.iterdir()}
    except ValueError as problem:
        return [str(problem)]
    except OSError as problem:
        return [f"{MANIFEST} cannot be read: {problem.strerror}"]
    extra = sorted(present.keys() - expected.keys() - {MANIFEST})
    problems += [f"{name} is not in the manifest" for name in extra if name.endswith(".safetensors") or name in READ_BY_NAME]
    if contents and not problems:
        links = [name for name in expected if present[name]]
        notes = [f"not in the manifest, and ignored: {', '.join(extra)}"] if extra else []
        notes += [f"links, whose contents verify: {', '.join(sorted(links))}"] if links else []
        if notes:
            log.warning("%s holds files that are %s", folder, "; ".join(notes))
    return problems


def _read_manifest(file: Path) -> Expected:
    """Raises ValueError with a one-line reason."""
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    try:
        manifest = json.loads(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise ValueError(f"{file.name} cannot be read: byte {problem.start} is not UTF-8") from problem
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file.name} cannot be read: it is not JSON: {problem}") from problem
    try:
        if manifest["format"] != 1:
            raise ValueError(f"{file.name} has format {manifest['format']!r}, and 1 is known")
        return {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise ValueError(f"{file.name} cannot be read: it does not list names, sizes and hashes") from problem


def _problem_of(path: Path, name: str, size: int, sha256: str, contents: bool) -> str | None:
    if Path(name).name != name:
        return f"{name} leads out of the folder"
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if contents and hash_file(path) != sha256:
            return f"{name} does not have the hash of what was written"
    except OSError as problem:
        return f"{name} cannot be read: {problem.strerror}"
    return None


@contextlib.contextmanager
def lock(file: Path, in_use: Callable[[str], UserError] | None = None) -> Iterator[None]:
    """Hold a lock file, which names the process that holds it. The lock ends with the process, however it ends, so it is never
    stale. If another process holds it, wait, or raise `in_use(holder)`.

    Not filelock's: older versions empty the file before they know whether another process holds it.
    """
    with open(file, "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if in_use else 0))
        except BlockingIOError as problem:
            assert in_use
            stream.seek(0)
            raise in_use(stream.read().strip() or "another process") from problem
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def lock_run_dir(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """One run at a time in a run_dir. Raises ConfigError when another process holds it."""

    def in_use(holder: str) -> ConfigError:
        return ConfigError("run_dir", f"{run_dir} is in use by {holder}; stop it, or choose another run_dir")

    return lock(run_dir / ".lock", in_use)

"""Runs that die at a chosen file operation: forked children of the test, in which the operating system's calls are counted.

    run(words, world=2, die=Death(rank=0, at=7))      trains in forked processes; rank 0 is killed at its 7th operation
    run(words, stop_in=2)                             trains; rank 0 gets SIGTERM in the middle of its second evaluation

An operation is a call that changes the disk's structure or flushes it (open for writing, fsync, rename, replace, mkdir,
unlink, rmdir) or a write. With `power_cut` the kill also empties every file that was never flushed and cuts appended ones
to their last flushed length; with `torn` it is the next write that dies, leaving half of its bytes. With `stop` the process
gets SIGTERM in place of the kill.
"""

import builtins
import contextlib
import io
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from ranks import environments, exit_code, fork

from olmo_train.__main__ import main

PATIENCE = 120  # seconds for a run of a few steps on a busy machine


@dataclass(frozen=True)
class Death:
    rank: int = 0
    at: int = 0  # the number of the operation; 0: only count
    power_cut: bool = False
    torn: bool = False
    stop: bool = False


class Disk:
    """Counts the operations of this process below a folder and kills it at one of them."""

    def __init__(self, folder: Path, death: Death):
        self.folder, self.death, self.count = folder, death, 0
        self.unflushed: dict[str, int] = {}  # path -> bytes that are known to be on the disk

    def install(self) -> None:
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        real_fsync = os.fsync

        def fsync(descriptor):
            self._operation()
            real_fsync(descriptor)
            self.unflushed.pop(os.readlink(f"/proc/self/fd/{descriptor}"), None)

        os.fsync = fsync
        real_open = io.open

        def opened(file, mode="r", *args, **kwargs):
            if not isinstance(file, (str, os.PathLike)) or not self._is_inside(file):
                return real_open(file, mode, *args, **kwargs)
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *args, **kwargs)
            path = os.path.realpath(file)
            self._operation()
            self.unflushed.setdefault(path, os.path.getsize(path) if "a" in mode and os.path.exists(path) else 0)
            return Written(real_open(file, mode, *args, **kwargs), self)

        io.open = builtins.open = opened

    def _counted(self, real):
        def call(path, *args, **kwargs):
            if self._is_inside(path):
                self._operation()
                if real.__name__ in ("rename", "replace"):  # what was not flushed keeps to be so under its new name
                    old, new = os.path.realpath(path), os.path.realpath(args[0])
                    self.unflushed = {new + p[len(old) :] if p.startswith(old) else p: n for p, n in self.unflushed.items()}
            return real(path, *args, **kwargs)

        call.__name__ = real.__name__
        return call

    def _is_inside(self, path) -> bool:
        """Whether a path is part of what must survive: not the heartbeats, whose number depends on the clock."""
        path = Path(os.path.abspath(os.fspath(path)))
        return path.is_relative_to(self.folder) and ".heartbeats" not in path.parts

    def _operation(self) -> None:
        """Count an operation, and die before it when it is the one."""
        self.count += 1
        if self.count == self.death.at and not self.death.torn:
            self.die()

    def is_torn(self) -> bool:
        """Whether this write is the first at or after the operation at which a torn write was asked for."""
        return self.death.torn and self.count >= self.death.at > 0

    def die(self) -> None:
        if self.death.power_cut:
            for path, size in list(self.unflushed.items()):  # another thread may be writing
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
        os.kill(os.getpid(), signal.SIGTERM if self.death.stop else signal.SIGKILL)


class Written:
    """A file open for writing, each write of which is an operation."""

    def __init__(self, file, disk: Disk):
        self._file, self._disk = file, disk

    def write(self, content):
        self._disk._operation()
        if self._disk.is_torn():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._disk.die()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def signal_in_evaluation(number: int, setattr=setattr) -> None:
    """From now on this process gets SIGTERM in the middle of its evaluation `number`, counted from 1."""
    from olmo_train.eval import during_run

    real, seen = during_run.loss_sums, []

    def interrupted(model, batches, stop):
        def signalled():
            for at, batch in enumerate(batches):
                if at == 1 and len(seen) == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        seen.append(1)
        return real(model, signalled(), stop)

    setattr(during_run, "loss_sums", interrupted)


def run(words: list[str], run_dir: Path, world: int = 1, die: Death | None = None, stop_in: int = 0) -> tuple[list[int], int]:
    """Train in `world` forked processes. Gives their exit codes (-9: killed), and the operations of the rank that was to die.

    `stop_in`: the number of the evaluation in which rank 0 gets SIGTERM; 0: none.
    """
    death, counter = die or Death(), run_dir.with_name(run_dir.name + ".count")

    def train(rank: int) -> int:
        disk = Disk(run_dir, death)
        if stop_in and rank == 0:
            signal_in_evaluation(stop_in)
        if rank == death.rank:
            disk.install()
        code = main(["train", *words])
        if rank == death.rank:
            counter.write_text(str(disk.count))
        return code

    places = environments(world) if world > 1 else [{}]
    children = [fork(lambda rank=rank: train(rank), os.devnull, **place) for rank, place in enumerate(places)]
    return [exit_code(child, PATIENCE) for child in children], int(counter.read_text()) if counter.exists() else 0

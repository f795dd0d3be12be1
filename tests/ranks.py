"""A function on several ranks at once: forked children of the test that form a world over gloo.

    first, second = on_ranks(2, function)      function(world) -> anything that JSON can hold, on each rank

Forking skips the import of torch, so two ranks cost about a second.
"""

import faulthandler
import gc
import json
import os
import signal
import socket
import tempfile
import time
import traceback
from pathlib import Path

from olmo_train.parallel.world import join_world

PATIENCE = 90  # seconds; a test takes one or two on a quiet machine


def on_ranks(size: int, function) -> list:
    """What `function` gives on each rank. Raises AssertionError with the ranks' tracebacks when one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gc.collect()  # process groups of earlier tests, whose threads a child would wait for in vain
        children = [_start(rank, size, port, folder, function) for rank in range(size)]
        _wait(children, folder)
        failures = [file.read_text() for file in sorted(folder.glob("*.error"))]
        assert not failures, "\n".join(failures)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _start(rank: int, size: int, port: int, folder: Path, function) -> int:
    child = os.fork()
    if child:
        return child
    try:
        gc.freeze()
        faulthandler.register(signal.SIGUSR2, open(folder / f"{rank}.stacks", "w"))  # noqa: SIM115
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with join_world() as world:
            result = function(world)
            (folder / f"{rank}.json").write_text(json.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(0)


def _wait(children: list[int], folder: Path) -> None:
    """Until all have ended; the stacks of those that do not are told."""
    deadline, left = time.monotonic() + PATIENCE, set(children)
    while left and time.monotonic() < deadline:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.01)
    if left:
        for number, patience in ((signal.SIGUSR2, 1.0), (signal.SIGKILL, 0.0)):
            for child in left:
                os.kill(child, number)
            time.sleep(patience)
        for child in left:
            os.waitpid(child, 0)
        stacks = "\n".join(f"{file.stem}:\n{file.read_text()}" for file in sorted(folder.glob("*.stacks")))
        raise AssertionError(f"{len(left)} ranks did not end within {PATIENCE} s; their stacks:\n{stacks}")

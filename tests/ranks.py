"""A function on several ranks at once: forked children of the test that form a world over gloo.

    first, second = on_ranks(2, function)      function(world) -> anything that JSON can hold, on each rank

Forking skips the import of torch, so two ranks cost about a second.
"""

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

from olmo_train.distributed import join_world

PATIENCE = 120  # seconds


def on_ranks(size: int, function) -> list:
    """What `function` gives on each rank. Raises AssertionError with the ranks' tracebacks when one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.stdout.flush()
        children = [_start(rank, size, port, folder, function) for rank in range(size)]
        _wait(children)
        failures = [file.read_text() for file in sorted(folder.glob("*.error"))]
        assert not failures, "\n".join(failures)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _start(rank: int, size: int, port: int, folder: Path, function) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with join_world() as world:
            result = function(world)
            (folder / f"{rank}.json").write_text(json.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(0)


def _wait(children: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while children:
        done, _ = os.waitpid(children[0], os.WNOHANG)
        if done:
            children = children[1:]
        elif time.monotonic() > deadline:
            for child in children:
                os.kill(child, 9)
            raise AssertionError(f"{len(children)} ranks did not end within {PATIENCE} s")
        else:
            time.sleep(0.01)

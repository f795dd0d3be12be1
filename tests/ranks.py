"""Forked children of the test: several ranks at once, or one process that a test signals or kills.

    first, second = on_ranks(2, function)      function(world) -> anything that JSON can hold, on each rank
    pid = fork(function, output=file)          function() -> its exit code, which exit_code(pid) waits for

Forking skips the imports, so two ranks cost about a second.
"""

import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # imported here, what every child would import at its start and first step, in a second
import yaml  # noqa: F401

import olmo_train.train  # noqa: F401
from olmo_train.parallel import cpu_kernels  # noqa: F401
from olmo_train.parallel.world import join_world

# Start autograd's threads now, one for each device, of which conftest.py hides the GPUs. After the first fake tensor a CUDA build
# of torch without a GPU counts eight devices, and no child of a process with a thread for a device may use autograd.
torch.ones((), requires_grad=True).backward()
PATIENCE = 90  # seconds; a test takes one or two on a quiet machine


def fork(function, output=None, **environment: str) -> int:
    """The pid of a child that exits with the number that function() returns, or 0, or 1 if it raises. With `output`, stderr goes
    to this file and stdout nowhere, also of code that writes to the descriptors."""
    gc.collect()  # process groups of earlier tests, whose threads a child would wait for in vain
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        gc.freeze()
        gc.unfreeze = lambda: None  # at its end a run would collect the objects of the test's process too
        os.environ |= environment
        if output is not None:
            for number, file in ((1, os.devnull), (2, output)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            logging.getLogger().handlers.clear()  # pytest's: warnings go to stderr, as in any process
        result = function()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int, seconds: float = 60) -> int:
    """The exit code of a child that ends within `seconds`; minus the number of the signal that ended it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} is still there after {seconds} s")


def environments(size: int) -> list[dict[str, str]]:
    """What torchrun would set for each of `size` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [place | {"RANK": str(rank)} for rank in range(size)]


def on_ranks(size: int, function, **options) -> list:
    """The result of `function` on each rank; `options` are those of join_world. Raises AssertionError with the tracebacks of the
    ranks that fail."""
    assert size == 1 or not torch.cuda.is_available(), "two ranks would share one GPU; see conftest.py"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [
            fork(lambda rank=rank: _run(rank, folder, function, options), **environment)
            for rank, environment in enumerate(environments(size))
        ]
        _wait(children, folder)
        failures = [file.read_text() for file in sorted(folder.glob("*.error"))]
        assert not failures, "\n".join(failures)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _run(rank: int, folder: Path, function, options: dict) -> None:
    faulthandler.register(signal.SIGUSR2, open(folder / f"{rank}.stacks", "w"))  # noqa: SIM115
    try:
        with join_world(**options) as world:
            result = function(world)
            (folder / f"{rank}.json").write_text(json.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")


def _wait(children: list[int], folder: Path) -> None:
    """Until all have ended. Raises AssertionError with the stacks of those that do not."""
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

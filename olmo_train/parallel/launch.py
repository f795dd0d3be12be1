"""Start the processes of a run on this machine, with torchrun's options:

    python -m olmo_train.parallel.launch --standalone --nproc-per-node=8 -m olmo_train train CONFIG.yaml

It is torchrun with two differences. It exits with the exit code of the run, and the last line is the run's; torchrun exits with 1
after a table and a traceback. It passes stop signals on and waits until the run has saved; torchrun kills the run 30 s after a
signal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from olmo_train.parallel.processes import STOP_SIGNALS

CPP_LEVEL = "TORCH_CPP_LOG_LEVEL"
PROC = Path("/proc")
# The most telling code first: when one process ends with an error, the others exit with 6 or are killed.
ORDER = (5, 4, 3, 2, 1, 75, 130, 6)


def exit_code(codes: Collection[int]) -> int:
    """The exit code of a run whose processes exited with `codes`, where -n stands for death by signal n. If signals killed all of
    them it is 128 + n, as in a shell, where n is not the SIGTERM that torchrun sends to the others."""
    highest = max(codes)
    return next((code for code in ORDER if code in codes), highest if highest > 0 else 128 - highest)


def main(words: list[str]) -> int:
    """Run torchrun with these words; returns the exit code of the run."""
    level = os.environ.get(CPP_LEVEL)
    os.environ[CPP_LEVEL] = level or "FATAL"  # for this import: no C++ stack when another machine has ended, or not started
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if not level:
        del os.environ[CPP_LEVEL]  # the processes of the run do not inherit it
    arguments = run.parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", *words])
    if arguments.max_restarts:
        return _error("--max-restarts", "would start a run again that a signal has stopped; leave it out, or use torchrun", 2)
    logging.disable(logging.ERROR)  # torchrun reports every failed process, which has reported its error itself
    received: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        received.add(number)
        _signal_children(number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    try:
        run.run(arguments)
    except ChildFailedError as failed:
        code = exit_code([failure.exitcode for failure in failed.failures.values()])
        for rank, failure in failed.failures.items():
            if failure.exitcode < 0 and -failure.exitcode not in {signal.SIGTERM, *received} and code not in ORDER[:-1]:
                return _error(f"rank {rank}", f"was killed by {failure.signal_name()}; run the same command again", code)
        return code
    except (RendezvousError, DistError) as problem:
        if received or os.times().children_user:  # the run had started, and the machine that holds the store ended first
            return 6
        what = " ".join(str(problem).split()).partition(". ")[0] or type(problem).__name__
        return _error("--rdzv-endpoint", f"{what}; check that all machines have started and reach it", 1)
    return 0


def _signal_children(number: int) -> None:
    """Send a signal to the processes that this one has started; leave if there are none."""
    children = _children()
    for child in children:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child, number)
    if not children:
        sys.exit(128 + number)


def _children() -> list[int]:
    """The processes that this one has started, by /proc, or by ps on a system without it (macOS)."""
    parents = {}
    for file in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(file.parent.name)] = int(file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    if not parents:
        with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True) as ps:
            parents = {int(pid): int(parent) for pid, parent in map(str.split, ps.stdout)}
        parents.pop(ps.pid, None)
    return [pid for pid, parent in parents.items() if parent == os.getpid()]


def _error(where: str, what: str, code: int) -> int:
    print(f"error: {where}: {what}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

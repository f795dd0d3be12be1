"""The processes of a run, read from the environment variables of a launcher such as torchrun. Imports no torch."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from olmo_train.errors import ConfigError

GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # needed to join a process group
ON_MACHINE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # end a run after a save
HANDLED = "TORCHELASTIC_SIGNALS_TO_HANDLE"  # torchrun sets it for its processes
TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
FIX = "start the run with torchrun, or unset them for a run of one process"


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    launched: bool = False  # by a launcher: the process joins the group at MASTER_ADDR


def announced() -> Processes:
    """Read the environment: one process when none of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE is set.

    Raises ConfigError when some are missing, empty, not numbers, or contradict each other.
    """
    values = {name: os.environ[name] for name in (*GROUP, *ON_MACHINE) if name in os.environ}
    if not values.keys() - {"MASTER_ADDR", "MASTER_PORT"}:  # many cluster scripts set these two alone
        return Processes()
    shown = " ".join(f"{name}={value}" for name, value in values.items())
    missing = [name for name in GROUP if name not in values]
    if missing:
        raise ConfigError("environment", f"has {shown}, but not {', '.join(missing)}; {FIX}")
    numbers = {}
    for name, value in values.items():
        if not value.strip():
            raise ConfigError("environment", f"{name} is empty in {shown}; {FIX}")
        if name != "MASTER_ADDR":
            if not (value.isascii() and value.isdecimal()):
                raise ConfigError("environment", f"{name} must be a whole number in {shown}; {FIX}")
            numbers[name] = int(value)
    size, on_machine = numbers["WORLD_SIZE"], numbers.get("LOCAL_WORLD_SIZE", numbers["WORLD_SIZE"])
    for name, limit in (("RANK", size), ("LOCAL_RANK", on_machine), ("LOCAL_WORLD_SIZE", size + 1), ("MASTER_PORT", 2**16)):
        if numbers.get(name, 0) >= limit:
            raise ConfigError("environment", f"{name} must be below {limit} in {shown}; {FIX}")
    return Processes(numbers["RANK"], size, numbers.get("LOCAL_RANK", 0), launched=True)


def processes_on_machine(size: int) -> int:
    """How many of the `size` processes run on this machine, by LOCAL_WORLD_SIZE; all of them if it is not set."""
    word = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(word) if word.isdecimal() and 0 < int(word) <= size else size


def rank() -> int:
    """This process's rank; 0 if the environment describes no group to join."""
    try:
        return announced().rank
    except ConfigError:
        return 0


def killed_after() -> float | None:
    """Seconds after a stop signal at which torchrun kills this process; None if torchrun did not start it, or started it for
    launch.py, which waits. It is 30 s, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT where torchrun reads that."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or "SIGTERM" not in os.environ.get(HANDLED, "SIGTERM"):
        return None
    return float(os.environ.get(TIMEOUT, 30)) if reads_timeout() else 30.0


def reads_timeout() -> bool:
    """Whether the installed torchrun reads TORCH_ELASTIC_SHUTDOWN_TIMEOUT; that of torch 2.11 does not."""
    return _names_timeout(Path(find_spec("torch").origin).parent / "distributed/launcher/api.py")


@functools.cache  # asked with every line of metrics
def _names_timeout(file: Path) -> bool:
    return file.is_file() and TIMEOUT in file.read_text(encoding="utf-8")

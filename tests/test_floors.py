"""The plan of the house: a room imports only rooms on lower floors, and some libraries are allowed in few rooms.

The source is parsed, not imported, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "olmo_train"
FLOORS = (
    "errors",
    "storage allocator exact",
    "config console hardware optim distributed stats spikes model data",
    "kernels",
    "parallel checkpoint metrics guards replicas watchdog planner profiling curves eval provenance",
    "recipe resume forensics scaling",
    "evaluation records",
    "verdicts",
    "run",
    "train",
    "bench replay doctor convert",
    "commands",
    "__main__",
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}
LIBRARIES = {  # library: the rooms that may import it
    "omegaconf": {"config"},
    "wandb": {"metrics"},
    "pyarrow": {"data", "commands"},
    "torch.distributed": {"distributed", "parallel", "checkpoint"},
    "pickle": set(),
}


def dotted_names(tree: ast.AST, package: list[str]):
    """Every dotted name that the code imports or reads; relative imports start from `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def violations(file: str, source: str) -> list[str]:
    """One line for each rule that a file of the package breaks; `file` is its path below the package."""
    inside = Path(file).with_suffix("")
    room = inside.parts[0]
    if room == "__init__":
        return []
    if room not in FLOOR:
        return [f"{inside}: the room {room} has no floor; add it to FLOORS"]
    found = []
    for name in dotted_names(ast.parse(source), ["olmo_train", *inside.parts[:-1]]):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first == "olmo_train" and target != room and FLOOR.get(target, -1) >= FLOOR[room]:
            found.append(f"{inside}: imports {target}, which is not on a lower floor than {room}")
        for library, rooms in LIBRARIES.items():
            if f"{name}.".startswith(f"{library}.") and room not in rooms:
                found.append(f"{inside}: uses {library}, which only {sorted(rooms)} may")
    return found


def test_every_import_points_down():
    files = sorted(PACKAGE.rglob("*.py"))
    assert [line for file in files for line in violations(str(file.relative_to(PACKAGE)), file.read_text())] == []


@pytest.mark.parametrize(
    "file, code",
    [
        ("errors.py", "import olmo_train.config"),
        ("data/order.py", "def late():\n    from olmo_train.train import train"),
        ("parallel.py", "from olmo_train.checkpoint import save"),
        ("model/attention.py", "from olmo_train.data.loader import Batch"),
        ("model/attention.py", "from ..data import loader"),
        ("optim.py", "from olmo_train import model"),
        ("optim.py", "from . import hardware"),
        ("model/attention.py", "from torch import distributed"),
        ("train.py", "import torch.distributed as dist"),
        ("eval/perplexity.py", "import torch\ntorch.distributed.barrier()"),
        ("commands/train.py", "from omegaconf import OmegaConf"),
        ("train.py", "import wandb"),
        ("model/attention.py", "import pyarrow.parquet as pq"),
        ("checkpoint.py", "import pickle"),
        ("attic.py", "import os"),
    ],
)
def test_a_planted_violation_is_found(file, code):
    assert violations(file, code), f"{code!r} in {file} went unseen"


@pytest.mark.parametrize("file, code", [("model/attention.py", "from . import rope"), ("train.py", "import torch.distribution")])
def test_what_is_allowed_is_not_refused(file, code):
    assert violations(file, code) == []

"""The plan of the house: a room imports only rooms on lower floors, and some libraries are known to few rooms.

The source is parsed, not imported, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
import shutil
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
LIBRARIES = {  # library: the rooms that may know it
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


def violations(package: Path) -> list[str]:
    """One line for each rule that a file under `package` breaks."""
    found = []
    for file in sorted(package.rglob("*.py")):
        inside = file.relative_to(package).with_suffix("")
        room = inside.parts[0]
        if room == "__init__":
            continue
        if room not in FLOOR:
            found.append(f"{inside}: the room {room} has no floor; give it one here")
            continue
        for name in dotted_names(ast.parse(file.read_text()), ["olmo_train", *inside.parts[:-1]]):
            first, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if first == "olmo_train" and target != room and FLOOR.get(target, -1) >= FLOOR[room]:
                found.append(f"{inside}: imports {target}, which is not on a lower floor than {room}")
            for library, rooms in LIBRARIES.items():
                if f"{name}.".startswith(f"{library}.") and room not in rooms:
                    found.append(f"{inside}: uses {library}, which only {sorted(rooms)} may")
    return found


def test_every_import_points_down():
    assert violations(PACKAGE) == []


PLANTED = [
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
]


@pytest.mark.parametrize("file, code", PLANTED)
def test_a_planted_violation_is_found(tmp_path, file, code):
    copy = tmp_path / "olmo_train"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = violations(copy)
    (copy / file).parent.mkdir(exist_ok=True)
    with open(copy / file, "a") as source:
        source.write(f"\n\n{code}\n")
    assert set(violations(copy)) - set(before), f"{code!r} in {file} went unseen"


@pytest.mark.parametrize("file, code", [("model/attention.py", "from . import rope"), ("train.py", "import torch.distribution")])
def test_what_is_allowed_is_not_refused(tmp_path, file, code):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []

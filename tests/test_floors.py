"""The plan of the house: a room imports only rooms on lower floors, and some libraries are allowed in few rooms.

The source is parsed, not imported, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from olmo_train.train_config import TrainConfig

PACKAGE = Path(__file__).parent.parent / "olmo_train"
FLOORS = (  # lowest first; a folder's config.py lies below the rest of the folders, so that a configuration needs no torch
    "errors",
    "storage hardware formats deal",
    "config",
    "*/config",
    "model data optim",
    "train_config",
    "parallel plan",
    "checkpoint",
    "history",
    "log",
    "curves eval guards",
    "run",
    "train",
    "convert tools predict",
    "commands",
    "__main__",
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}
LIBRARIES = {  # library: the folders and files that may import it
    "omegaconf": {"config"},
    "wandb": {"log/wandb"},
    "pyarrow": {"data", "eval/tasks", "commands"},
    "torch.distributed": {"parallel", "checkpoint"},
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


def room_of(parts: Sequence[str]) -> str:
    """The name in FLOORS that stands for a module, by the parts of its path below the package."""
    is_section = len(parts) > 1 and parts[1] == "config" and parts[0] != "commands"  # commands/config.py is a verb
    return "*/config" if is_section else parts[0]


def violations(file: str, source: str) -> list[str]:
    """One line for each rule that a file of the package breaks; `file` is its path below the package."""
    inside = Path(file).with_suffix("")
    folder, room = inside.parts[0], room_of(inside.parts)
    if folder == "__init__":
        return []
    if room not in FLOOR:
        return [f"{inside}: the room {room} has no floor; add it to FLOORS"]
    found = []
    for name in dotted_names(ast.parse(source), ["olmo_train", *inside.parts[:-1]]):
        first, _, rest = name.partition(".")
        target = room_of(rest.split("."))
        same = rest.split(".")[0] == folder
        if first == "olmo_train" and not same and FLOOR.get(target, -1) >= FLOOR[room]:
            found.append(f"{inside}: imports {target}, which is not on a lower floor than {room}")
        for library, rooms in LIBRARIES.items():
            if f"{name}.".startswith(f"{library}.") and not {str(inside), folder} & rooms:
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
        ("parallel/shard.py", "from olmo_train.checkpoint import save"),
        ("model/attention.py", "from olmo_train.data.loader import Batch"),
        ("model/attention.py", "from ..data import loader"),
        ("optim/build.py", "from olmo_train import model"),
        ("optim/config.py", "from olmo_train.model import cost"),
        ("data/config.py", "from olmo_train import train_config"),
        ("optim/config.py", "from olmo_train.data.order import quotas"),
        ("data/order.py", "from .. import history"),
        ("log/recorder.py", "import wandb"),
        ("model/attention.py", "from torch import distributed"),
        ("train.py", "import torch.distributed as dist"),
        ("eval/perplexity.py", "import torch\ntorch.distributed.barrier()"),
        ("commands/train.py", "from omegaconf import OmegaConf"),
        ("train.py", "import wandb"),
        ("model/attention.py", "import pyarrow.parquet as pq"),
        ("checkpoint/save.py", "import pickle"),
        ("attic.py", "import os"),
    ],
)
def test_a_planted_violation_is_found(file, code):
    assert violations(file, code), f"{code!r} in {file} went unseen"


@pytest.mark.parametrize(
    "file, code",
    [
        ("model/attention.py", "from . import rope"),
        ("model/attention.py", "from olmo_train.optim.config import OptimConfig"),
        ("train.py", "import torch.distribution"),
    ],
)
def test_what_is_allowed_is_not_refused(file, code):
    assert violations(file, code) == []


def texts_without_encoding(source: str) -> list[int]:
    """Lines that open a text file, or read or write one, in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name, names_encoding = called.rpartition(".")[2], any(word.arg in ("encoding", None) for word in node.keywords)
        arguments = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        texts = [part.value for a in arguments for part in ast.walk(a) if isinstance(part, ast.Constant)]
        is_binary = any(isinstance(text, str) and "b" in text and set(text) <= set("rwxab+") for text in texts)
        opens = name in ("open", "fdopen") and called != "os.open" and not is_binary
        if (opens or name in ("read_text", "write_text")) and not names_encoding:
            found.append(node.lineno)
    return found


def test_every_text_file_names_its_encoding():
    """A locale that is not UTF-8 must not change what is written or read: an exported tokenizer would be another one."""
    missing = {str(file): lines for file in PACKAGE.rglob("*.py") if (lines := texts_without_encoding(file.read_text("utf-8")))}
    assert missing == {}


@pytest.mark.parametrize("code", ["open('a')", "open('a', 'w')", "p.open()", "p.read_text()", "p.write_text(t)", "os.fdopen(1)"])
def test_a_text_file_without_encoding_is_found(code):
    assert texts_without_encoding(code) == [1]
    assert texts_without_encoding(f"{code[:-1]}{'' if code.endswith('()') else ', '}encoding='utf-8')") == []


def rows_of(heading: str) -> list[list[list[str]]]:
    """A table of docs/architecture.md: for each row, the names in backticks of each cell."""
    page = (PACKAGE.parent / "docs/architecture.md").read_text("utf-8")
    table = page.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[re.findall(r"`([^`]+)`", cell) or cell.split() for cell in row.strip("| ").split("|")] for row in table]


def path_of(room: str) -> str:
    path = f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"
    assert list(PACKAGE.glob(path)), f"{path} of FLOORS or LIBRARIES does not exist"
    return path


def test_the_architecture_page_has_these_layers_and_libraries():
    layers = [[path_of(room) for room in rooms.split()] for rooms in reversed(FLOORS)]
    assert [rooms for _, rooms in rows_of("layer")] == layers
    libraries = {library: {path_of(room) for room in rooms} or {"nothing"} for library, rooms in LIBRARIES.items()}
    assert {library: set(rooms) for (library,), rooms in rows_of("library")} == libraries


def test_the_architecture_page_has_each_folder_and_its_keys():
    """The first word of a key is its folder: the section's dataclass is in that folder's config.py."""
    folders = {f"{file.parent.name}/": set() for file in PACKAGE.glob("*/__init__.py")}
    for key, kind in get_type_hints(TrainConfig).items():
        if is_dataclass(kind):
            folders[kind.__module__.split(".")[1] + "/"].add(key)
    assert {folder: set(keys) for (folder,), keys, *_ in rows_of("folder")} == folders

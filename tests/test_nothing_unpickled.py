"""No file is ever unpickled: the package is searched for every call that could run what lies in a file."""

import ast
import shutil
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "olmo_train"
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
# torch's DCP reader of its own format unpickles its .metadata; the safetensors reader does not.
FORBIDDEN = {"FileSystemReader", "FsspecReader", "eval", "exec", "unsafe_load", "full_load", "read_pickle"}


def executing(package: Path) -> list[str]:
    """One line for each place under `package` that could execute the contents of a file."""
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.relative_to(package)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                found += [f"{where} imports {name}" for name in names if name.split(".")[0] in UNPICKLERS | FORBIDDEN]
            if isinstance(node, ast.Call) and (problem := _problem_of(node)):
                found.append(f"{where} {problem}")
    return found


def _problem_of(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in FORBIDDEN or (name.split(".")[-1] in FORBIDDEN and not name.endswith(".eval")):  # model.eval() is a mode
        return f"calls {name}"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "calls torch.load without weights_only=True"
    if keywords.get("allow_pickle", "False") != "False" or "weights_only" in keywords and keywords["weights_only"] != "True":
        return f"calls {name} with {keywords}"
    if name == "yaml.load":
        return "calls yaml.load; safe_load builds no objects"
    return None


def test_the_package_unpickles_nothing():
    assert executing(PACKAGE) == []


PLANTED = [
    "import pickle",
    "from torch.distributed.checkpoint import FileSystemReader",
    "import torch\ntorch.load('x')",
    "import torch\ntorch.load('x', weights_only=False)",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import yaml\nyaml.load(open('x'))",
    "eval(open('x').read())",
]


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_call_is_found(tmp_path, code):
    copy = tmp_path / "olmo_train"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "checkpoint.py", "a") as source:
        source.write(f"\n\n{code}\n")
    assert executing(copy) != [], code

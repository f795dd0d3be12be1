"""The package installs: it declares and pins all that it needs, the command is found, and nothing heavy is imported."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import olmo_train

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "numpy", "omegaconf", "pyarrow", "tokenizers", "wandb", "rich", "matplotlib", "plotly", "transformers"}


def requirements() -> dict[str, Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    parsed = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(matches), "constraints.txt holds NAME==VERSION lines only: no build suffix, no address, no path"
    return {canonicalize_name(match[1]): match[2] for match in matches}


def test_every_requirement_is_pinned_within_its_range():
    pinned = pins()
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(pinned[name]), f"{requirement} and the pin {pinned[name]}"


def test_every_library_that_the_package_imports_is_declared():
    declared = set(requirements())
    distributions = packages_distributions()
    for file in (ROOT / "olmo_train").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"olmo_train"}:
                known = {canonicalize_name(name) for name in distributions.get(top, [OPTIONAL.get(top, top)])}
                assert known & declared, f"{file.relative_to(ROOT)} imports {top}, which pyproject.toml does not declare"


# Import names of optional libraries that need not be installed here.
OPTIONAL = {"pynvml": "nvidia-ml-py"}


def test_the_version_is_written_once_in_each_place_and_equal():
    assert olmo_train.__version__ == PROJECT["version"]


def test_the_console_script_points_to_a_function():
    module, _, function = PROJECT["scripts"]["olmo-train"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("code", ["import olmo_train", "from olmo_train.__main__ import main; main(['--help'])"])
def test_help_and_import_load_nothing_heavy(code):
    program = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nprint('loaded', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(out.stdout.splitlines()[-1].split())
    assert loaded & HEAVY == set()


def test_help_takes_less_than_half_a_second_of_computing():
    """The least of three, in CPU seconds, which other work on the machine changes little."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "olmo_train", "--help"], capture_output=True, cwd=ROOT, check=True)
        after = os.times()
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("goal", ["train", "train TEXT=my-text", "test", "check", "bench", "gpu-bundle"])
def test_each_make_goal_can_be_planned(goal, tmp_path):
    """In a fresh clone, as far as make can tell: every file that a rule needs has a rule that makes it."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-text").mkdir()
    planned = subprocess.run(["make", "--dry-run", *goal.split()], cwd=tmp_path, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "venv" in planned.stdout


def test_ctrl_c_during_the_install_shows_no_traceback(tmp_path):
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "venv.main" in line]
    program = line.split("'")[1]
    run = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / ".venv/pyvenv.cfg").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1] == "" and run.returncode == -signal.SIGINT


def test_git_ignores_what_the_goals_write():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/.venv/", "/data/", "/runs/", "/gpu-bundle/"} <= set(ignored)

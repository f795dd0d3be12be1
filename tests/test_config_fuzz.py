"""Whatever stands in a YAML file or in a word, the loader returns a configuration or refuses it in one line."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from olmo_train import config
from olmo_train.errors import ConfigError
from olmo_train.train_config import TrainConfig

KEYS = sorted(config.flatten(config.to_dict(config.load(TrainConfig, [], ["run_dir=r", "data.sources.a.path=x"]))))
KEYS += ["model", "data", "optim.betas", "data.sources", "data.sources.a", "data.stages", "log.wandb", "nothing", "a.b", ".", ""]
VALUES = ["null", "~", "~/x", "", "no", "on", "true", "1", "010", "0x1", "-1", "1e3", "1e999", "9" * 400, "2024_11_25", "12e5678"]
VALUES += [
    "12:30:45",
    ".nan",
    "-.inf",
    "???",
    "${seed}",
    "${",
    "${oc.env:HOME}",
    "${a.b}",
    "\\${x}",
    "[1, 2]",
    "{a: 1}",
    "{a: {path: b}}",
]
VALUES += [
    "[x",
    "'",
    '"\\x"',
    '"\\0"',
    '"\\ud800"',
    '"\\UFFFFFFFF"',
    "&a [*a]",
    "*a",
    "!!set {a}",
    "!x y",
    "- 1",
    "a: b",
    "# c",
    "@",
    "---",
]
VALUES += [
    "adamw",
    "muon",
    "olmo",
    "[{from_step: 5, weights: {a: 2}}]",
    "!!binary aGk=",
    "<<",
    "=",
    "a\nb",
    "\u2028",
    "\ufeff",
    "\x85",
]
TEXT = st.one_of(st.sampled_from(VALUES), st.text(max_size=8), st.integers().map(str), st.floats().map(repr))
WORDS = st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=6)), TEXT).map("=".join)


@st.composite
def yaml_files(draw) -> bytes:
    """A file of known keys with odd values, in blocks or flows, and sometimes with bytes changed."""
    lines = []
    for key, value in draw(st.lists(st.tuples(st.sampled_from(KEYS), TEXT), max_size=4, unique_by=lambda pair: pair[0])):
        parts = key.split(".")
        lines.append(": {".join(parts) + ": " + value + "}" * (len(parts) - 1))
    content = draw(st.sampled_from(["\n", "\r\n", "\n---\n"])).join(lines).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) < 3:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=6)) + content[at:]
    return content


def check_one(folder, content: bytes, words: list[str]) -> None:
    """The fact, for one input."""
    file = folder / "fuzz.yaml"
    file.write_bytes(content)
    try:
        loaded = config.load(TrainConfig, [file], ["run_dir=r", "data.sources.a.path=x", *words])
    except ConfigError as problem:
        assert str(problem)
        return
    file.write_bytes(config.dump(loaded).encode())
    assert config.load(TrainConfig, [file]) == loaded
    assert config.decoded(config.read([file])) == config.to_dict(loaded)


OPTIONS = {"deadline": None, "derandomize": True, "database": None}
CHECKS = {"suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **OPTIONS, **CHECKS)
@given(yaml_files(), st.lists(WORDS, max_size=4))
def test_any_file_and_words_are_a_configuration_or_one_error(tmp_path, content, words):
    check_one(tmp_path, content, words)


@pytest.mark.slow
@settings(max_examples=2000, **OPTIONS, **CHECKS)
@given(yaml_files(), st.lists(WORDS, max_size=4))
def test_any_of_two_thousand_files_and_words_are_a_configuration_or_one_error(tmp_path, content, words):
    check_one(tmp_path, content, words)

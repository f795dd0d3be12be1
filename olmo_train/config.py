"""Read YAML files and key=value words into frozen dataclasses; no other module parses YAML.

The dataclass is the schema; each section's is in the config.py of its folder. The types of its fields hold choices (`Literal`)
and ranges (`Count`, `Positive`, ...). This module merges the sources left to right, walks the dataclass, and refuses values that
do not fit, with the dotted key and the nearest known one.

Scalars are read as text, and the type of the field decides their meaning: `2024_11_25` is a name for a text key and a number
for a number key. YAML itself would turn a git hash such as 12e5678 into infinity, and a source called `no` into False.
"""

from __future__ import annotations

import ast
import dataclasses
import glob
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from olmo_train.errors import BothSet, ConfigError, indented_with_tab, nearest, nearest_key, no_such_file, not_offered, reason
from olmo_train.storage import FilePath

T = TypeVar("T")
MISSING = "???"  # how OmegaConf marks a value that must be set
NULLS = ("", "~", "null", "Null", "NULL")
BOOLS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?", re.ASCII)
# Removed keys, still found in configurations saved by earlier versions: the value that equals today's behaviour.
REMOVED = {"model.position": "rope", "log.wandb.artifacts": "false"}
STARTED_IN = "# Relative paths start from "  # the first line of a run's config.yaml, then the folder as a JSON string
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


class Rule(NamedTuple):
    """A condition on a value, as part of its type. NaN meets none of those below."""

    text: str  # follows "must be" in the error
    holds: Callable[[Any], bool]


Count = Annotated[int, Rule("at least 1", lambda n: n >= 1)]
Natural = Annotated[int, Rule("at least 0", lambda n: n >= 0)]
Positive = Annotated[float, Rule("finite and above 0", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Rule("finite and at least 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Rule("at least 0 and below 1", lambda x: 0 <= x < 1)]


class Word(str):
    """A scalar as it was typed. A text key takes the text itself; keys of other types read `value`."""

    quoted: bool  # quoted in YAML: always text
    base: str | None  # the folder in which the run that wrote this config.yaml was started

    def __new__(cls, text: str, quoted: bool = False, base: str | None = None) -> Word:
        self = super().__new__(cls, text)
        self.quoted, self.base = quoted, base
        return self

    @property
    def value(self) -> int | float | bool | str:
        """A number or truth value as YAML writes them, or the text. Numbers are decimal: 010 is ten, and 1e4 is a number."""
        lower = self.lower()
        if lower in BOOLS:
            return BOOLS[lower]
        if lower.lstrip("+-") in (".nan", ".inf", "nan", "inf"):
            return float(lower.replace(".", ""))
        if not NUMBER.fullmatch(self):
            return str(self)
        digits = self.replace("_", "")
        is_whole = digits.lstrip("+-").isdigit() and len(digits) < 1000  # Python refuses to read thousands of digits
        return int(digits) if is_whole else float(digits)


def read(files: list[str | Path], overrides: list[str] = (), resolve: bool = True) -> dict[str, Any]:
    """Merge YAML files left to right, then `key=value` words, into nested dicts and lists whose scalars are Words or None,
    for `build` or `decoded`. Without `resolve`, interpolations `${...}` stay as text.

    Raises ConfigError when a file is missing or is not a YAML mapping, or a word has no `=`.
    """
    merged: dict[str, Any] = {}
    for _, tree in _trees(files, overrides):
        merged = _merge(merged, tree)
    return _interpolated(merged, files[0] if files else "configuration") if resolve and "${" in repr(merged) else merged


def origins(files: list[str | Path], overrides: list[str] = ()) -> dict[str, str]:
    """{dotted key: the file that set it last, or `command line`}; a key that nothing sets is not in it."""

    def marked(tree: Any, origin: str) -> Any:
        return {key: marked(value, origin) for key, value in tree.items()} if isinstance(tree, dict) else origin

    merged: dict[str, Any] = {}
    for origin, tree in _trees(files, overrides):
        merged = _merge(merged, marked(tree, origin))
    return flatten(merged)


def _trees(files: list[str | Path], overrides: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, content) of each file and of each key=value word, in the order in which they are merged."""
    for file in files:
        yield str(file), _read_file(file)
    for word in overrides:
        yield "command line", _read_word(word)


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}


def _read_file(file: str | Path) -> dict[str, Any]:
    if not Path(file).is_file():
        raise ConfigError(file, no_such_file(Path(file)))
    try:
        content = Path(file).read_bytes()
        tree = _parse(content)
    except OSError as problem:
        raise ConfigError(file, f"cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise ConfigError(file, f"is not valid YAML: {indented_with_tab(content) or reason(problem)}") from problem
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(file, "must be a mapping of keys to values at the top level")
    return _of_run(tree, content, Path(file).parent) if content.startswith(STARTED_IN.encode()) else tree


def _of_run(tree: dict[str, Any], content: bytes, folder: Path) -> dict[str, Any]:
    """The config.yaml of a run: relative paths are also looked up in the folder where the run was started."""
    base = json.loads(content.splitlines()[0][len(STARTED_IN) :])
    tree = words(tree, base)
    run_dir = tree.get("run_dir")
    if isinstance(run_dir, Word):  # a copy of the file elsewhere starts another run, in the run_dir it names
        is_own = _is_same(Path(base, run_dir), folder) and not _is_same(Path(run_dir), folder)
        tree["run_dir"] = Word(str(folder) if is_own else run_dir, run_dir.quoted)
    return tree


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _read_word(word: str) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": Word("1")}}. The value is YAML; text without quotes stays as typed."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(word, "is neither a YAML file nor key=value")
    typed = Word(text.strip())
    try:
        value = _parse(text)
    except ValueError as problem:
        if typed[:1] in ("[", "{", "'", '"'):
            raise ConfigError(key, f"cannot be set to {text!r}, which is not valid YAML: {reason(problem)}") from problem
        value = typed
    if isinstance(value, Word) and not value.quoted or value is None and typed not in NULLS:
        value = typed  # including what YAML reads as a comment or a tag
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _parse(content: str | bytes) -> Any:
    """A YAML document as dicts, lists, Words and None. Raises ValueError."""
    import yaml

    loader = None
    try:
        loader = yaml.SafeLoader(content)  # rejects bytes that are not text
        return _tree(loader, loader.get_single_node(), {})
    except (yaml.YAMLError, OverflowError) as problem:  # "\\UFFFFFFFF" is not a character
        raise ValueError(re.sub(r'\bin "<[^"]+>", ', "at ", str(problem))) from problem  # not a name of PyYAML's
    except RecursionError as problem:
        raise ValueError("it is nested too deeply, or an alias refers to itself") from problem
    finally:
        if loader:
            loader.dispose()


def _tree(loader: Any, node: Any, done: dict[Any, Any]) -> Any:
    """The value of a node. `done`: values that aliases may refer to."""
    import yaml

    kind = "null" if node is None else node.tag.removeprefix("tag:yaml.org,2002:")
    if node in done:
        return done[node]
    if kind == "map":
        keys = [key.value for key, _ in node.value]
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise ValueError(f"line {node.start_mark.line + 1}: a key must be text")
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {min(twice)!r} occurs twice")
        loader.flatten_mapping(node)  # <<: *other
        done[node] = {key.value: _tree(loader, value, done) for key, value in node.value}
    elif kind == "seq":
        done[node] = [_tree(loader, item, done) for item in node.value]
    elif kind == "null":
        return None
    elif kind in ("str", "int", "float", "bool", "timestamp", "value", "merge"):
        return Word(node.value, quoted=node.style is not None)
    else:
        raise ValueError(f"line {node.start_mark.line + 1}: the tag {node.tag!r} is not known")
    return done[node]


def _interpolated(tree: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The same tree with `${...}` replaced."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def marked(before: Any, after: Any) -> Any:
        if isinstance(before, dict):
            return {key: marked(value, after[key]) for key, value in before.items()}
        if isinstance(before, list):
            return [marked(*pair) for pair in zip(before, after, strict=True)]
        return words(after, quoted=False) if before and "${" in before else before

    try:
        plain = _map(lambda leaf: leaf and str(leaf), tree)
        return marked(tree, OmegaConf.to_container(OmegaConf.create(plain), resolve=True))
    except (OmegaConfBaseException, RecursionError) as problem:
        raise ConfigError(where, (str(problem).splitlines() or ["an interpolation refers to itself"])[0]) from problem


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with each scalar replaced."""
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_map(function, value) for value in tree]
    return function(tree)


def decoded(tree: Any) -> Any:
    """The result of `read` as numbers, booleans and text, for callers without a dataclass."""
    return _map(lambda leaf: (str(leaf) if leaf.quoted else leaf.value) if isinstance(leaf, Word) else leaf, tree)


def words(tree: Any, base: str | None = None, quoted: bool = True) -> Any:
    """The same tree with text as Words that know the folder in which the run that saved it was started."""

    def word(leaf: Any) -> Any:
        return Word(leaf, leaf.quoted if isinstance(leaf, Word) else quoted, base) if isinstance(leaf, str) else leaf

    return _map(word, tree)


def build(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Make the frozen dataclass `cls` from a plain dict, strictly. `where` is the dotted key of `values`. Raises ConfigError."""
    try:
        return _build(cls, values, where)
    except UnknownKey as problem:
        if where:
            raise
        what = f"is not a known key; {nearest_key(str(problem.where), [name for name, *_ in walk(cls)])}"
        raise ConfigError(problem.where, not_offered(str(problem.where)) or what) from problem


class UnknownKey(ConfigError):
    """A key that its section does not have."""


def walk(cls: type, where: str = "") -> Iterator[tuple[str, type, dataclasses.Field, Any]]:
    """(dotted key, its dataclass, field, type) of each key below a dataclass, in the order of the fields. In a dotted key NAME
    stands for any name, N for a place in a list."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], where + field.name
        if not dataclasses.is_dataclass(hint):
            yield name, cls, field, hint
        place = {dict: ".NAME", tuple: ".N"}.get(get_origin(hint), "")
        for nested in filter(dataclasses.is_dataclass, (hint, *get_args(hint))):
            yield from walk(nested, f"{name}{place}.")


def _build(cls: type[T], values: dict[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in fields:
            if str(value).lower() == REMOVED.get(dotted):
                continue
            if dotted in REMOVED:
                raise ConfigError(dotted, f"was removed, and only {REMOVED[dotted]} is still accepted, got {value}; leave it out")
            raise UnknownKey(dotted, f"is not a known key; {nearest(str(key), fields)}")
        made[key] = _convert(hints[key], value, dotted)
    for name, field in fields.items():
        if name not in made and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            dotted = f"{where}.{name}" if where else name
            if not dataclasses.is_dataclass(hints[name]):
                raise ConfigError(dotted, f"is missing and has no default; set it as {dotted}=VALUE")
            made[name] = build(hints[name], {}, dotted)  # raises with the key that is missing
    return cls(**made)


def load(cls: type[T], files: list[str | Path], overrides: list[str] = ()) -> T:
    """`build(cls, read(files, overrides))`: what commands call."""
    try:
        return build(cls, read(files, overrides))
    except BothSet as problem:
        raise problem.naming(origins(files, overrides)) from None


def names_in(table: str, file: Path) -> tuple[str, ...]:
    """The names of the rows of a table `TABLE = {"name": ..., }` in a Python file, read without importing the file, which may
    need torch."""
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == table:
            assert isinstance(statement.value, ast.Dict), f"{table} of {file} is no {{...}}"
            return tuple(ast.literal_eval(key) for key in statement.value.keys)
    raise AssertionError(f"{file} has no table {table}")


def to_dict(config: Any) -> Any:
    """A dataclass as plain dicts and lists, to be saved, logged and compared."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def dump(config: Any, started_in: str | None = None) -> str:
    """A dataclass or plain values as YAML text that `load` reads back as an equal one. `started_in`: the working directory of
    the run, from which relative paths can be resolved later."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that a YAML reader could take for a number or a boolean."""

        def represent_str(self, text: str) -> yaml.Node:
            style = None if isinstance(Word(text).value, str) else "'"
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_str)
    values = to_dict(config)
    if dataclasses.is_dataclass(config) or started_in:  # its text is final: escape `${`, which is no interpolation
        values = _map(lambda v: re.sub(r"(\\*)\$\{", r"\1\1\\${", v) if isinstance(v, str) else v, values)
    text = yaml.dump(values, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return f"{STARTED_IN}{json.dumps(started_in)}\n{text}" if started_in else text


def flatten(config: Any, where: str = "") -> dict[str, Any]:
    """{dotted key: leaf value}, to compare two configurations."""
    if not isinstance(config, dict) or not config:
        return {where: config}
    parts = (flatten(value, f"{where}.{key}" if where else str(key)) for key, value in config.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(where, f"is missing ({MISSING}); set it")
    if origin is Annotated:
        made = _convert(args[0], value, where)
        for rule in args[1:]:
            if not rule.holds(made):
                raise ConfigError(where, f"must be {rule.text}, got {made}")
        return made
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            what = not_offered(f"{where}={value}") or f"{value!r} is not a choice; {nearest(str(value), map(str, args))}"
            raise ConfigError(where, what)
        return args[args.index(value)]
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(where, f"must be a mapping of keys, got {decoded(value)!r}")
        return build(hint, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(where, f"must be a mapping of names, got {decoded(value)!r}")
        # null removes an entry of an earlier file
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items() if v is not None}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            what = f"must be a list, got {decoded(value)!r}"
            raise ConfigError(where, f"{what}; write [{decoded(value)}]" if isinstance(decoded(value), str) else what)
        items = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(items) != len(value):
            raise ConfigError(where, f"must be a list of {len(items)} values, got {decoded(value)!r}")
        return tuple(_convert(item, v, f"{where}.{i}") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except ConfigError as problem:
            problems.append(problem)
    raise problems[0]


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    """int accepts 2e6 and float accepts 3, since people write both; bool is never a number."""
    if hint in (str, FilePath):
        return _convert_text(hint, value, where)
    if isinstance(value, str):
        value = Word(value).value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and number and (isinstance(value, float) or abs(value) < 1e300):
        return float(value)
    if hint is int and number and (isinstance(value, int) or value.is_integer()):
        if not -(2**63) <= value < 2**63:
            raise ConfigError(where, f"must lie between -2^63 and 2^63 - 1, got {value}")
        return int(value)
    raise ConfigError(where, f"must be {TYPE_NAMES[hint]}, got {decoded(value)!r}")


def _convert_text(hint: Any, value: Any, where: str) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ConfigError(where, f"is empty; set {where}=VALUE" if value is None else f"must be text, got {decoded(value)!r}")
    if "\0" in str(value):
        raise ConfigError(where, f"must be text without a NUL character, got {str(value)!r}")
    return _found(value) if hint is FilePath and isinstance(value, str) else str(value)


def _found(path: str) -> str:
    """A path with ~ expanded. For a run that was started elsewhere, a path that is missing here is looked up there."""
    base, path = getattr(path, "base", None), os.path.expanduser(path)
    if base is None or os.path.isabs(path) or "://" in path or any(glob.iglob(path, recursive=True)) or os.path.exists(path):
        return path
    for there in (os.path.join(base, path), os.path.join(glob.escape(base), path)):
        if os.path.exists(there) or any(glob.iglob(there, recursive=True)):
            return there
    return path

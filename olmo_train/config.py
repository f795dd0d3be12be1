"""YAML files and key=value words become frozen dataclasses; nothing else in the package knows YAML.

The one idea: the dataclass is the schema. Each lives in the file that reads it; this module merges the sources left to
right, walks the dataclass, and refuses what does not fit, naming the dotted key and the nearest known one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from olmo_train.errors import ConfigError, nearest

T = TypeVar("T")


def read(files: list[str | Path], overrides: list[str] = (), resolve: bool = True) -> dict[str, Any]:
    """Merge YAML files left to right, then `key=value` words, into a plain dict. Without `resolve`, interpolations
    `${...}` stay as text.

    Raises ConfigError when a file is missing or is no YAML mapping, or a word has no `=`.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    merged = OmegaConf.create()
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(file, "there is no such configuration file")
        try:
            layer = OmegaConf.load(file)
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as problem:
            raise ConfigError(file, f"is not valid YAML: {' '.join(str(problem).split())}") from problem
        if not isinstance(layer, DictConfig):
            raise ConfigError(file, "must hold a mapping of keys to values at its top")
        merged = OmegaConf.merge(merged, layer)
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise ConfigError(word, "is neither a YAML file nor key=value")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([word]))
        except (YAMLError, OmegaConfBaseException) as problem:
            raise ConfigError(key, f"cannot be set to {word.partition('=')[2]!r}: {problem}") from problem
    try:
        return typing.cast(dict, OmegaConf.to_container(merged, resolve=resolve))
    except OmegaConfBaseException as problem:
        raise ConfigError(files[0] if files else "configuration", str(problem).splitlines()[0]) from problem


def build(cls: type[T], values: dict[str, Any], where: str = "", partial: bool = False) -> T:
    """Make the frozen dataclass `cls` from a plain dict, strictly.

    `where` is the dotted key of `values`. With `partial`, keys that `cls` lacks are passed over at the top level: for
    commands that need a few keys of a whole run's configuration. Raises ConfigError.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in fields:
            if partial:
                continue
            raise ConfigError(dotted, f"is not a known key; {nearest(str(key), fields)}")
        made[key] = _convert(hints[key], value, dotted)
    for name, field in fields.items():
        if name not in made and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            dotted = f"{where}.{name}" if where else name
            if not dataclasses.is_dataclass(hints[name]):
                raise ConfigError(dotted, "is missing and has no default; set it")
            made[name] = build(hints[name], {}, dotted)  # which names what it misses
    return cls(**made)


def load(cls: type[T], files: list[str | Path], overrides: list[str] = (), partial: bool = False) -> T:
    """`build(cls, read(files, overrides))`: what commands call."""
    return build(cls, read(files, overrides), partial=partial)


def to_dict(config: Any) -> Any:
    """A dataclass as plain dicts and lists: what is saved, logged and compared."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def dump(config: Any) -> str:
    """A dataclass as YAML text that `load` reads back to an equal one."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(config: Any, where: str = "") -> dict[str, Any]:
    """{dotted key: leaf value}: what two configurations are compared by."""
    if not isinstance(config, dict) or not config:
        return {where: config}
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{where}.{key}" if where else str(key)))
    return flat


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(where, f"{value!r} is not a choice; {nearest(str(value), map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(where, f"must be a mapping of keys, got {value!r}")
        return build(hint, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(where, f"must be a mapping of names, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(where, f"must be a list, got {value!r}")
        items = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(items) != len(value):
            raise ConfigError(where, f"must be a list of {len(items)} values, got {list(value)!r}")
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


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    """int accepts 2e6 and float accepts 3, since both are how people write numbers; bool is never a number."""
    if hint is float and value in (".inf", "-.inf"):  # YAML's spelling, in JSON too, which has no number for it
        return float(value.replace(".", ""))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(where, f"must be {_TYPE_NAMES[hint]}, got {value!r}")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

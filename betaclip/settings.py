"""Dataclasses from and to TOML files: one table per nested dataclass, one key per field.

Written here rather than taken from a library, since each of those that convert dataclasses lacks something that a file
of settings needs: a table that changes a few fields of a default, the nearest key in the message about a wrong one, and
true not passing for 1.
"""

import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from betaclip.errors import ConfigError, nearest, not_one_of

T = TypeVar("T")

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")  # of TOML


# Values that a choice had under other names, in files and on command lines of before.
RENAMED_VALUES = {"false": "local"}


def bounded(
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field for a number, or several, whose range :func:`check_numbers` checks."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={name: bound for name, bound in bounds.items() if bound is not None})


_RANGES: dict[str, Callable[[float, float], bool]] = {
    "at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt,
}  # fmt: skip
_WORDS = {"at_least": "at least", "above": "more than", "at_most": "at most", "below": "less than"}


def check_numbers(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for a number that is not finite, or outside the range that its field gives."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            check_numbers(value, f"{prefix}{f.name}.")
        elif isinstance(value, Mapping):
            for key, one in value.items():
                if is_dataclass(one):
                    check_numbers(one, f"{prefix}{f.name}.{key}.")
                else:
                    _check_number(one, {}, f"{prefix}{f.name}.{key}")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                _check_number(one, f.metadata, prefix + f.name)


def _check_number(value: Any, bounds: Mapping[str, Any], where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value}")
    given = [(name, holds, bounds[name]) for name, holds in _RANGES.items() if name in bounds]
    if not all(holds(value, bound) for _, holds, bound in given):
        expected = " and ".join(f"{_WORDS[name]} {bound}" for name, _, bound in given)
        raise ConfigError(f"{where}: expected {expected}, got {value}")


def read(default: T, path: Path) -> T:
    """The dataclass ``default``, with the values of a TOML file in place of its own.

    Raises:
        ConfigError: the file does not exist or is not TOML, a key is unknown (the message names the nearest one) or has
            been renamed, or a value has the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return from_dict(default, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_path(name: str) -> Path:
    """The TOML file at the path ``name``, or the recipe of that name that comes with the package.

    Raises:
        ConfigError: ``name`` has no suffix, and neither a file nor a recipe has this name.
    """
    if Path(name).suffix or Path(name).is_file():
        return Path(name)
    recipes = {file.stem: file for file in _recipes()}
    if name not in recipes:
        one = not_one_of(name, sorted(recipes)).removeprefix("expected ")
        raise ConfigError(f"--config: expected a TOML file or {one}")
    return recipes[name]


def _recipes() -> list[Path]:
    try:
        files = [Path(str(entry)) for entry in resources.files("betaclip.configs").iterdir()]
    except ModuleNotFoundError:  # a checkout that was not installed has them beside the package
        files = list(Path(__file__).parents[1].joinpath("configs").glob("*"))
    return [file for file in files if file.suffix == ".toml"]


def from_dict(default: T, values: dict[str, Any]) -> T:
    """The dataclass ``default``, with values of nested dictionaries in place of its own.

    A field's metadata may name the key that it had before as "was".

    Raises:
        ConfigError: as :func:`read`.
    """
    return _build(default, values, "", list(keys(type(default))))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values: paths become strings, tuples become lists, and None is left out."""
    return {f.name: _plain(value) for f in fields(config) if (value := getattr(config, f.name)) is not None}


def to_toml(config: Any) -> str:
    """A TOML document from which :func:`read` makes an equal dataclass. TOML has no None: fields that are None must be
    None by default."""
    return "\n".join(_lines(to_dict(config), "")) + "\n"


def keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a result of :func:`to_dict`, each with its name: "table.key"."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A line "key: old -> new" for each value that differs between two results of :func:`to_dict`."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b and not (isinstance(a, str) and RENAMED_VALUES.get(a) == b):
            yield f"{prefix}{key}: {a!r} -> {b!r}"


def filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A result of :func:`to_dict`, with ``defaults`` for what it lacks."""
    both = ((key, value, defaults.get(key)) for key, value in values.items())
    tables = {key: filled(v, default) for key, v, default in both if isinstance(v, dict) and isinstance(default, dict)}
    return defaults | values | tables


def _build(default: Any, values: dict[str, Any], prefix: str, known: list[str]) -> Any:
    hints = get_type_hints(type(default))
    changes = {}
    for key, value in values.items():
        where = prefix + key
        if key not in hints:
            for f in fields(default):
                if f.metadata.get("was") == key:
                    raise ConfigError(f"{where!r} has been renamed to '{prefix}{f.name}'")
            raise ConfigError(f"unknown key {where!r}; the nearest is {nearest(where, known)!r}")
        if not is_dataclass(hints[key]):
            changes[key] = _value(hints[key], value, where)
        elif isinstance(value, dict):
            changes[key] = _build(getattr(default, key), value, f"{where}.", known)
        else:
            raise ConfigError(f"{where}: expected a table, got {value!r}")
    try:
        return replace(default, **changes)
    except ValueError as error:  # from the dataclass's __post_init__
        raise ConfigError(f"{prefix.rstrip('.')}: {error}" if prefix else str(error)) from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as an instance of ``hint``, or ConfigError."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for member in (a for a in args if a is not NoneType):
            try:
                return _value(member, value, where)
            except ConfigError as error:
                last = error
        raise last
    if origin is Literal:
        try:
            return choice(args, value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if origin is Mapping:
        if isinstance(value, Mapping) and is_dataclass(args[1]):
            return {str(k): _table(args[1], str(k), v, where) for k, v in value.items()}
        if isinstance(value, Mapping):
            return {str(k): _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
        raise ConfigError(f"{where}: expected a table, got {value!r}")
    if origin in (tuple, list):
        many = args[-1] is ... or origin is list
        if isinstance(value, list | tuple) and (many or len(value) == len(args)):
            each = [args[0]] * len(value) if many else args
            return origin(_value(a, v, where) for a, v in zip(each, value, strict=True))
        raise ConfigError(f"{where}: expected a list of {'any number' if many else len(args)}, got {value!r}")
    accepted: dict[Any, Any] = {float: (int, float), Path: (str, Path)}
    if isinstance(value, accepted.get(hint, hint)) and (hint is bool or not isinstance(value, bool)):
        return hint(value)
    raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")


def choice(names: tuple[str, ...], value: Any) -> str:
    """The name that a value stands for among those of a Literal, or ConfigError."""
    if not isinstance(value, str):
        raise ConfigError(f"expected one of {', '.join(names)}, got {value!r}")
    renamed = RENAMED_VALUES.get(value, value)
    if value not in names and renamed not in names:
        raise ConfigError(not_one_of(value, names))
    return value if value in names else renamed


def _table(kind: Any, name: str, value: Any, where: str) -> Any:
    """The dataclass that a mapping holds under a name, from a table, or ConfigError."""
    if not _BARE_KEY.fullmatch(name):
        raise ConfigError(f"{where}.{name}: expected a name of letters, digits, - and _")
    if not isinstance(value, dict):
        raise ConfigError(f"{where}.{name}: expected a table, got {value!r}")
    prefix = f"{where}.{name}."
    return _build(kind(), value, prefix, list(keys(kind, prefix)))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _lines(table: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        if not isinstance(value, dict):
            yield f"{key} = {_literal(value)}"
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield f"\n[{prefix}{key}]"
            yield from _lines(value, f"{prefix}{key}.")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)  # TOML's integers and floats are written as Python's

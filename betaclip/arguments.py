"""Parses a command's arguments into its dataclass by tyro. Whatever is wrong with them is an error of one line."""

import io
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from betaclip.errors import ConfigError, nearest
from betaclip.settings import choice

_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
_NUMBERS = {int: "an integer", float: "a number"}
_RULE = re.compile(r"[\s│╰╯─-]*")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def parse(kind: Any, prog: str, description: str, arguments: list[str], default: Any = None) -> Any:
    """The dataclass ``kind`` with the values of the arguments; others are those of ``default``, if it is given.

    Raises:
        ConfigError: an argument is unknown, missing, or of another form than expected.
        SystemExit: help was asked for and is printed.
    """
    options = {} if default is None else {"default": default}
    with redirect_stderr(io.StringIO()) as printed:
        try:
            config, unknown = tyro.cli(
                kind,
                prog=prog,
                description=description,
                args=arguments,
                return_unknown_args=True,
                registry=_registry(),
                config=(tyro.conf.HelptextFromCommentsOff,),  # comments are for those who read the code
                **options,
            )
        except SystemExit as stopped:
            if not stopped.code:
                raise
            raise ConfigError(_line(printed.getvalue()).replace(f"Missing from {prog}:", "missing:")) from None
    sys.stderr.write(printed.getvalue())
    if unknown:
        raise ConfigError(_about_unknown(unknown[0], kind, default, arguments))
    return config


def _registry() -> ConstructorRegistry:
    """A rule for single values. With tyro's own, errors would take several lines and name no nearest choice."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        optional = info.type_origin in (Union, UnionType) and NoneType in get_args(info.type)
        kinds = [kind for kind in get_args(info.type) if kind is not NoneType] if optional else [info.type]
        if len(kinds) != 1:
            return None
        kind, choices = kinds[0], get_args(kinds[0]) if get_origin(kinds[0]) is Literal else ()
        if not choices and kind not in _METAVARS:
            return None

        def value(texts: list[str]) -> Any:
            if optional and texts[0] == "None":
                return None
            return choice(choices, texts[0]) if choices else _convert(kind, texts[0])

        def is_instance(value: Any) -> bool:
            if value is None:
                return optional
            return value in choices if choices else isinstance(value, (int, float) if kind is float else kind)

        metavar = f"{{{','.join(choices)}}}" if choices else _METAVARS[kind]
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{metavar}|None" if optional else metavar,
            instance_from_str=value,
            is_instance=is_instance,
            str_from_instance=lambda instance: [str(instance)],
        )

    return registry


def _convert(kind: Any, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {_NUMBERS[kind]}, got {text!r}") from None


def _line(printed: str) -> str:
    """The message in what tyro prints: a title, the message and advice, with a rule between each two. On terminals that
    can show it, the title is in the first line of a box around the rest."""
    parts: list[list[str]] = [[]]
    for line in _COLOUR.sub("", printed).splitlines():
        if line.startswith("╭") or _RULE.fullmatch(line):
            parts.append([])
        else:
            parts[-1].append(line.strip("│ "))
    return " ".join(parts[1]).strip().removeprefix("Error parsing ")


def _about_unknown(first: str, kind: Any, default: Any, arguments: list[str]) -> str:
    options = dict(_options(kind, default))
    if first.startswith("-"):
        name = first.partition("=")[0].replace("_", "-")
        return f"unknown option {name}; the nearest is {nearest(name, [*options, *filter(None, options.values())])}"
    before = arguments[max(0, arguments.index(first) - 1)].replace("_", "-")
    if options.get(before):
        return f"{before}: expected no value, got {first!r}; {options[before]} turns it off"
    return f"unexpected argument {first!r}"


def _options(kind: Any, default: Any, prefix: str = "--") -> Iterator[tuple[str, str | None]]:
    """Each option with, if it is a switch, its opposite."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        name, hint, value = f.name.replace("_", "-"), hints[f.name], getattr(default, f.name, None)
        if is_dataclass(hint):
            yield from _options(hint, value, f"{prefix}{name}.")
        elif isinstance(value, Mapping) and any(map(is_dataclass, value.values())):
            for key, one in value.items():
                yield from _options(type(one), one, f"{prefix}{name}.{key}.")
        else:
            yield prefix + name, f"{prefix}no-{name}" if bool in (hint, *get_args(hint)) else None

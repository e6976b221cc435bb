"""What tyro prints about wrong arguments becomes one line, on any terminal."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import DisallowNone, Positional

from betaclip.arguments import parse
from betaclip.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Some options."""

    # A comment that is not for users.
    file: Positional[Path]
    """A file."""
    kind: Literal["a", "false", "local"] = "a"
    """A kind."""
    rate: float | None = None
    """A rate."""
    on: Annotated[bool | None, DisallowNone] = None
    """A switch."""


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@contextmanager
def shown_on(output: str) -> Iterator[io.TextIOWrapper]:
    """Where tyro prints boxes of lines, plain rules, or colours."""
    kind, encoding = (Terminal, "utf-8") if output == "terminal" else (io.TextIOWrapper, output)
    with redirect_stdout(kind(io.BytesIO(), encoding=encoding)) as out:
        yield out


outputs = pytest.mark.parametrize("output", ["utf-8", "ascii", "terminal"])


@outputs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing: FILE|PATH A file. (required)"),
        (["x", "--rate", "1,5"], "--rate: expected a number, got '1,5'"),
        (["x", "--rate"], "Missing value for argument '--rate'. Expected 1 values."),
        (["x", "--kind", "lokal"], "--kind: expected one of a, false, local, got 'lokal'; the nearest is 'local'"),
        (["x", "--onn"], "unknown option --onn; the nearest is --on"),
        (["x", "--on", "True"], "--on: expected no value, got 'True'; --no-on turns it off"),
        (["x", "y"], "unexpected argument 'y'"),
    ],
)
def test_one_line(monkeypatch, output, arguments, message):
    monkeypatch.setenv("TERM", "xterm")
    with shown_on(output), pytest.raises(ConfigError) as raised:
        parse(Options, "betaclip x", "Does x.", arguments)
    assert str(raised.value) in (message, message.replace("FILE|", ""))


def test_values():
    config = parse(Options, "x", "", ["x", "--rate", "-1e-3", "--no-on", "--kind", "local"])
    assert config == Options(Path("x"), "local", -1e-3, on=False)
    assert parse(Options, "x", "", ["x", "--rate", "None"], Options(Path("y"), "a", 3.0)).rate is None
    assert parse(Options, "x", "", ["x"]).on is None


def test_help():
    """Comments are not shown."""
    with shown_on("utf-8") as out, pytest.raises(SystemExit) as stopped:
        parse(Options, "betaclip x", "Does x.", ["--help"])
    out.seek(0)
    text = out.read()
    assert stopped.value.code in (0, None) and "Does x." in text and "A kind." in text and "comment" not in text

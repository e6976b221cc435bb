"""Errors that a user can fix, and how a program may end early."""

import difflib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(ValueError):
    """Invalid setting; the message names it and the accepted values."""


class OutputError(OSError):
    """A file or folder cannot be written; the message names it and the reason."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the message names the step, losses, scales and images."""


class Stopped(SystemExit):
    """A signal came and what was trained is saved. Ends the process with the signal's exit code.

    folder, step: of the run to continue; None if the signal came before or after training.
    """

    def __init__(self, number: int, folder: Path | None = None, step: int = 0) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {signal.Signals(number).name}"
        if folder is None:
            self.message += "; nothing that was trained is lost"
        else:
            self.message += f" after step {step}; --run.resume continues from {folder}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The name most like ``name``, capital letters aside, for messages about a misspelled one."""
    known = {one.lower(): one for one in names}
    return known[difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)[0]]


def not_one_of(name: str, names: Iterable[str]) -> str:
    """A message about a name that is not in a short list: "expected one of a, b, got 'c'; the nearest is 'a'"."""
    names = list(names)
    return f"expected one of {', '.join(names)}, got {name!r}; the nearest is {nearest(name, names)!r}"


@contextmanager
def closed_pipe_ends_output() -> Iterator[None]:
    """End quietly when nobody reads the output any more, as in ``betaclip env | head``."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits

"""Errors that a user can mend, and how a program may end early."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(ValueError):
    """Invalid setting; the message names it and the accepted values."""


class OutputError(OSError):
    """A file or folder cannot be written; the message names it and the reason."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the message names the step, losses, scales and images."""


class Stopped(SystemExit):
    """SIGTERM came and a checkpoint has been written. Ends the process with that signal's exit code."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = f"stopped by SIGTERM after step {step}; --run.resume continues from {folder}"


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

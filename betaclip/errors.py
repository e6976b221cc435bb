"""Errors that a user can mend, and how a run may end before its last step."""

import signal
from pathlib import Path


class ConfigError(ValueError):
    """Invalid setting; the message names it and the accepted values."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the message names the step, the losses, the scales and the images."""


class Stopped(SystemExit):
    """SIGTERM came and a checkpoint is written; ends the process with the code of that signal."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = f"stopped by SIGTERM after step {step}; --run.resume goes on from {folder}"

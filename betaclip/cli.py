"""The command `betaclip`: train, evaluate, visualize, report and others. A command imports only what it needs."""

import difflib
import importlib
import logging
import multiprocessing
import signal
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import betaclip
from betaclip.errors import ConfigError, NonFiniteError, OutputError, Stopped, closed_pipe_ends_output
from betaclip.signals import stop_signals


class Command(NamedTuple):
    """A command: ``run`` is a function in ``module``, ``config`` the dataclass in ``module`` that it takes, or None."""

    module: str
    config: str | None
    run: str
    help: str


COMMANDS = {
    "train": Command("betaclip.train", "TrainConfig", "main", "train a model; by default a small one"),
    "evaluate": Command(
        "betaclip.evaluation.run", "EvaluateConfig", "evaluate", "retrieval, regions, pointing, classes"
    ),
    "visualize": Command("betaclip.visualize", "VisualizeConfig", "visualize", "a picture of each text's attention"),
    "report": Command("betaclip.report", "ReportConfig", "report", "write a page about a run, to open in a browser"),
    "prepare": Command("betaclip.data.prepare", "PrepareConfig", "prepare", "extract the phrases of captions once"),
    "export": Command("betaclip.export", "ExportConfig", "export", "write a model in the published layout"),
    "env": Command("betaclip.env", None, "main", "versions, devices and backends, for a bug report"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits with 2 if its arguments are invalid, and with 1 if it fails later."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with closed_pipe_ends_output():
        if not arguments or arguments[0] in ("-h", "--help"):
            print("usage: betaclip COMMAND [--help]\n       betaclip --version\n")
            for name, command in COMMANDS.items():
                print(f"  {name:10} {command.help}")
        elif arguments[0] == "--version":
            print(f"betaclip {betaclip.__version__}")
        else:
            _dispatch(*arguments)


def _dispatch(name: str, *arguments: str) -> None:
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        _exit(f"betaclip: no command {name!r}; the nearest is {nearest!r}", 2)
    command = COMMANDS[name]
    try:
        if command.config is None:
            _run_without_config(name, command, arguments)
        else:
            _run(name, command, command.config, list(arguments))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "betaclip":
            raise
        _exit(f"betaclip {name}: the package {error.name} is missing: pip install 'betaclip[train]'", 1)


def _run_without_config(name: str, command: Command, arguments: tuple[str, ...]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: betaclip {name}\n\n{_sentence(command.help)}")
    elif arguments:
        _exit(f"betaclip {name}: expected no arguments, got {' '.join(arguments)}", 2)
    else:
        getattr(importlib.import_module(command.module), command.run)()


def _run(name: str, command: Command, config_class: str, arguments: list[str]) -> None:
    from betaclip.data.batches import BadDataError

    logging.basicConfig(format="%(message)s")
    try:
        with stop_signals() if name == "train" else nullcontext():
            module = importlib.import_module(command.module)
            config = _parse(name, getattr(module, config_class), command.help, arguments)
            getattr(module, command.run)(config)
    except ConfigError as error:
        _exit(f"betaclip {name}: {error}", 2)
    except (BadDataError, NonFiniteError, OutputError) as error:
        _exit(f"betaclip {name}: {error}", 1)
    except Stopped as stopped:
        with suppress(OSError):  # the terminal may have hung up
            print(f"betaclip {name}: {stopped.message}", file=sys.stderr)
        _end_children()
        raise


def _parse(name: str, kind: Any, help_: str, arguments: list[str]) -> Any:
    """The command's settings."""
    import tyro

    from betaclip.settings import read

    description = _sentence(help_)
    options: dict[str, Any] = {}
    if name == "train":
        file, arguments = _config_file(arguments)
        options["default"] = kind() if file is None else read(kind(), file)
        description += " --config FILE: a TOML file with other defaults for these options, or the name of a recipe."
    return tyro.cli(kind, prog=f"betaclip {name}", description=description, args=arguments, **options)


def _end_children() -> None:
    """End the processes that read data. One that waits for a file for ever would keep Python from exiting."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes the end of a worker for a failure
    for child in multiprocessing.active_children():
        child.kill()


def _config_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Take ``--config FILE`` or ``--config=FILE`` out of the arguments."""
    from betaclip.settings import config_path

    file, rest = None, []
    left = iter(arguments)
    for argument in left:
        if argument == "--config":
            argument = "--config=" + next(left, "")
        if not argument.startswith("--config="):
            rest.append(argument)
        elif argument == "--config=":
            raise ConfigError("--config: expected a file")
        else:
            file = config_path(argument.removeprefix("--config="))
    return file, rest


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)

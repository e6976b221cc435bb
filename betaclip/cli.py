"""The command `betaclip`: train, evaluate, visualize, report and others. A command imports only what it needs."""

import importlib
import logging
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import betaclip
from betaclip.errors import ConfigError, NonFiniteError, OutputError, Stopped, closed_pipe_ends_output, nearest
from betaclip.signals import end_workers, stop_signals


class Command(NamedTuple):
    """A command: ``run`` is a function in ``module``, ``config`` the dataclass in ``module`` that it takes, or None."""

    module: str
    config: str | None
    run: str
    help: str


COMMANDS = {
    "train": Command("betaclip.train", "TrainConfig", "main", "train a model; by default a small one, on scenes"),
    "evaluate": Command(
        "betaclip.evaluation.run",
        "EvaluateConfig",
        "evaluate",
        "evaluate a model: retrieval, fine-grained choices, pointing, zero-shot classification",
    ),
    "visualize": Command("betaclip.visualize", "VisualizeConfig", "visualize", "draw where texts look in a picture"),
    "report": Command("betaclip.report", "ReportConfig", "report", "write a page about a run, to open in a browser"),
    "prepare": Command(
        "betaclip.data.prepare", "PrepareConfig", "prepare", "extract the phrases of captions once, into a file"
    ),
    "export": Command("betaclip.export", "ExportConfig", "export", "write a model for open_clip or transformers"),
    "env": Command("betaclip.env", None, "main", "print versions, devices and backends, for a bug report"),
}


_FILES = (
    "--config FILE: a TOML file with other defaults for these options, or the name of a recipe. --smoke: everything "
    "that a run does, in less than a minute."
)
_SWITCHES = "A switch such as --x is turned off by --no-x."


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
        _exit(f"betaclip: no command {name!r}; the nearest is {nearest(name, COMMANDS)!r}", 2)
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
        end_workers()
        raise


def _parse(name: str, kind: Any, help_: str, arguments: list[str]) -> Any:
    """The command's settings.

    Raises:
        ConfigError: an argument is wrong, whatever the others are.
    """
    from betaclip.arguments import parse
    from betaclip.settings import check_numbers, read

    description, default = _sentence(help_), None
    if name == "train":
        default = kind()
        files, arguments = _config_files(arguments)
        for file in files:
            default = read(default, file)
        description += f" {_FILES}"
    config = parse(kind, f"betaclip {name}", f"{description} {_SWITCHES}", arguments, default)
    check_numbers(config)
    return config


def _config_files(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Take ``--config FILE``, ``--config=FILE`` and ``--smoke`` out of the arguments. Each file gives other defaults to
    those before it; the one of ``--smoke`` comes last."""
    from betaclip.settings import config_path

    files, rest = [], []
    left = iter(arguments)
    for argument in left:
        if argument == "--config":
            argument = "--config=" + next(left, "")
        if argument == "--config=":
            raise ConfigError("--config: expected a file")
        if argument.startswith("--config="):
            files.append(config_path(argument.removeprefix("--config=")))
        elif argument != "--smoke":
            rest.append(argument)
    return files + [config_path("smoke")] * ("--smoke" in arguments), rest


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)

"""The command `betaclip`: train, evaluate, visualize, prepare. A command imports only what it needs."""

import difflib
import importlib
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    """config and run: names in ``module``, of a dataclass and of a function of it."""

    module: str
    config: str
    run: str
    help: str


COMMANDS = {
    "train": Command("betaclip.train", "TrainConfig", "main", "train a model; by default a small one"),
    "evaluate": Command("betaclip.evaluation.run", "EvaluateConfig", "evaluate", "retrieval, regions and pointing"),
    "visualize": Command("betaclip.visualize", "VisualizeConfig", "visualize", "a picture of each text's attention"),
    "prepare": Command("betaclip.data.prepare", "PrepareConfig", "prepare", "extract the phrases of captions once"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits with 2 for what is wrong with its arguments, and 1 for what goes wrong later."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: betaclip COMMAND [--help]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {command.help}")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        _exit(f"betaclip: no command {name!r}; the nearest is {nearest!r}", 2)
    try:
        _run(name, rest)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "betaclip":
            raise
        _exit(f"betaclip {name}: the package {error.name} is missing: pip install 'betaclip[train]'", 1)


def _run(name: str, arguments: list[str]) -> None:
    import tyro

    from betaclip.data.batches import BadDataError
    from betaclip.errors import ConfigError, NonFiniteError, Stopped
    from betaclip.settings import read

    logging.basicConfig(format="%(message)s")
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    kind: Any = getattr(module, command.config)
    description = f"{command.help[0].upper()}{command.help[1:]}."
    try:
        options: dict[str, Any] = {}
        if name == "train":
            file, arguments = _config_file(arguments)
            options["default"] = kind() if file is None else read(kind(), file)
            description += " --config FILE: a TOML file with other defaults for what follows."
        config = tyro.cli(kind, prog=f"betaclip {name}", description=description, args=arguments, **options)
        getattr(module, command.run)(config)
    except (OSError, ValueError) as error:
        # The others make ConfigErrors of what they expect; what else comes is a fault of ours, with its traceback.
        if name != "prepare" and not isinstance(error, ConfigError):
            raise
        _exit(f"betaclip {name}: {error}", 2)
    except (BadDataError, NonFiniteError) as error:
        _exit(f"betaclip {name}: {error}", 1)
    except Stopped as stopped:
        print(f"betaclip {name}: {stopped.message}", file=sys.stderr)
        raise


def _config_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Take ``--config FILE`` or ``--config=FILE`` out of the arguments."""
    from betaclip.errors import ConfigError

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
            file = Path(argument.removeprefix("--config="))
    return file, rest


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)

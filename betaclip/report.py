"""``betaclip report``: writes a page about a run that one opens in a browser."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from betaclip.checkpoint import load_checkpoint
from betaclip.errors import ConfigError
from betaclip.evaluation.report import Results
from betaclip.evaluation.run import Evaluator
from betaclip.model.beta_clip import BetaCLIP
from betaclip.page.page import FILE, write_page
from betaclip.process_group import initialized
from betaclip.settings import read
from betaclip.train import GLOBAL, GLOBAL_FOLDER, OURS, TrainConfig, create_evaluator
from betaclip.training.config import RunConfig
from betaclip.training.log import read_metrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportConfig:
    """The run, and the file to write."""

    run: tyro.conf.Positional[Path]
    """The run's folder, or its name if the folder is in runs/. A run that was stopped, or is still at work, will do."""
    out: Path | None = None
    """The file to write; by default report.html in the run's folder."""
    device: str = "auto"
    """cpu, cuda or auto, which takes a GPU if there is one."""


def report(config: ReportConfig) -> None:
    """Write the page.

    Raises:
        ConfigError: there is no such run, it has logged nothing, or one of its files is damaged.
        OutputError: the file cannot be written.
    """
    folder = run_folder(config.run)
    settings = read(TrainConfig(), folder / "config.toml")
    runs = {name: path for name, path in ((OURS, folder), (GLOBAL, folder / GLOBAL_FOLDER)) if path.is_dir()}
    with initialized(config.device) as (_, device):
        model = _model(folder, device)
        if model is None and not read_metrics(folder / "metrics.jsonl"):
            raise ConfigError(f"run: {folder} has logged nothing yet, and has no checkpoint")
        file = config.out or folder / FILE
        write_page(file, settings, runs, _results(folder / "results.json"), model, _evaluator(settings))
    print(f"wrote {file}; open it in a browser")


def run_folder(run: Path) -> Path:
    """The folder of a run that is given by its folder or by its name.

    Raises:
        ConfigError: there is no run.
    """
    default = RunConfig().folder
    for folder in (run, default / run):
        if (folder / "config.toml").is_file():
            return folder
    if run.is_file():
        raise ConfigError(f"run: expected the folder of a run, got the file {run}; it may be in {run.parent}")
    if run.is_dir():
        raise ConfigError(f"run: {run} holds no run: it has no config.toml")
    raise ConfigError(f"run: expected the folder of a run, or the name of one in {default}/, got {run}")


def _model(folder: Path, device: torch.device) -> BetaCLIP | None:
    """The model of the run's last checkpoint; None if it has written none."""
    try:
        return load_checkpoint(folder, device=device)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"run: {error}") from error


def _results(file: Path) -> Results:
    """The final results; none if the run has not come to its end, or was not evaluated."""
    if not file.exists():
        return {}
    try:
        results = json.loads(file.read_bytes())
        return {str(name): {str(k): float(v) for k, v in values.items()} for name, values in results.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"run: {file}: expected what betaclip train writes there: {error}") from error


def _evaluator(settings: TrainConfig) -> Evaluator | None:
    """The sets that the run was evaluated on; None, with a warning, if they are no longer there."""
    try:
        return create_evaluator(settings)
    except ConfigError as error:
        _log.warning("left out the choices: %s", error)
        return None

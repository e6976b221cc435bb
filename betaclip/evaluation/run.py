"""``betaclip evaluate``: a checkpoint on the sets that are asked for."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from betaclip.checkpoint import load_checkpoint
from betaclip.data.batches import Bad
from betaclip.data.multiple_choice import ChoiceSet
from betaclip.data.readers import fg_ovd
from betaclip.data.readers.retrieval_set import RetrievalSet
from betaclip.data.registry import RETRIEVAL_SETS, RetrievalConfig
from betaclip.data.transforms import EvaluationTransform
from betaclip.errors import ConfigError
from betaclip.evaluation.encode import NoPicturesError, log_unusable
from betaclip.evaluation.report import table, write_json
from betaclip.evaluation.tasks.multiple_choice import choice_accuracy
from betaclip.evaluation.tasks.retrieval import retrieval, texts_of_pictures
from betaclip.evaluation.tasks.scenes import evaluate_scenes
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup, initialized

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig(RetrievalConfig):
    """What to evaluate a checkpoint on. Under torchrun, ranks share the work."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, the folder of a run, or a file in the published layout."""
    scenes: int = 0
    """Number of rendered scenes: retrieval, choices and pointing."""
    fg_ovd: Path | None = None
    """Folder of FG-OVD's files, in either form: choices, of each difficulty whose file is there."""
    fg_ovd_images: Path | None = None
    """Folder of COCO, with train2017/ and val2017/; by default that of the files."""
    conditioned: bool = True
    """Text-conditioned retrieval too: each text pools each picture, much more work than the rest."""
    output: Path | None = None
    """JSON file for the results."""
    batch_size: int = 64
    """Pictures, texts or questions that a rank encodes at a time."""
    seed: int = 0
    """Of the scenes."""
    device: str = "auto"
    """auto takes a GPU if there is one."""


@dataclass(frozen=True)
class Sets:
    """What was read of the sets that a configuration names; choices by difficulty."""

    retrieval: list[RetrievalSet]
    choices: dict[str, ChoiceSet]

    @property
    def bad(self) -> list[list[Bad]]:
        """Of each set, what of it cannot be used."""
        return [*(one.missing for one in self.retrieval), *(one.bad for one in self.choices.values())]


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Print a table, write the JSON, and return, for each set, shares and counts by their names.

    Raises:
        ConfigError: nothing is asked for, or what is asked for is not there.
    """
    if config.batch_size < 1 or config.scenes < 0:
        raise ConfigError(f"expected batch_size >= 1 and scenes >= 0, got {config.batch_size} and {config.scenes}")
    with initialized(config.device) as (process_group, device):
        sets = read_sets(config)
        if not (config.scenes or sets.retrieval or sets.choices):
            options = ", ".join(f"--{name}" for name in ("scenes", *RETRIEVAL_SETS))
            raise ConfigError(f"nothing to evaluate: give {options} or --fg-ovd")
        try:
            if config.output is not None:  # before hours of work
                config.output.parent.mkdir(parents=True, exist_ok=True)
            model = load_checkpoint(config.checkpoint, device=device)
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
        if process_group.is_first:
            for bad in sets.bad:
                log_unusable(bad)
            for difficulty in fg_ovd.DIFFICULTIES:
                if sets.choices and difficulty not in sets.choices:
                    _log.warning("left out the %s choices: no such file in %s", difficulty, config.fg_ovd)
        results = evaluate_sets(config, sets, model, process_group)
        if process_group.is_first:
            print(table(results))
            if config.output is not None:
                write_json(results, config.output)
    return results


def read_sets(config: EvaluateConfig) -> Sets:
    """
    Raises:
        ConfigError: a set is not there, or has nothing that can be used.
    """
    try:
        return Sets(config.read_retrieval_sets(), {} if config.fg_ovd is None else _choices(config, config.fg_ovd))
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def evaluate_sets(
    config: EvaluateConfig, sets: Sets, model: BetaCLIP, process_group: ProcessGroup = SINGLE_PROCESS
) -> dict[str, dict[str, float]]:
    """What :func:`evaluate` returns, of a model and sets that are there; of ``config`` only numbers are read.

    Raises:
        ConfigError: none of a set's pictures can be read.
    """
    tokenizer = Tokenizer(model.context_length)
    options: Any = {"batch_size": config.batch_size, "process_group": process_group}
    results: dict[str, dict[str, float]] = {}
    if config.scenes:
        results["scenes"] = evaluate_scenes(
            model, tokenizer, seed=config.seed, count=config.scenes, conditioned=config.conditioned, **options
        )
    for one in sets.retrieval:
        pictures, transform = texts_of_pictures(one), EvaluationTransform(model.image_size)
        try:
            values = retrieval(model, tokenizer, pictures, transform, conditioned=config.conditioned, **options)
        except NoPicturesError as error:
            raise ConfigError(f"{one.name}: {error}") from error
        values["left_out"] += len(one.missing)
        results[one.name] = {f"retrieval/{name}": value for name, value in values.items()}
    if sets.choices:
        questions = [(difficulty, choice) for difficulty, found in sets.choices.items() for choice in found]
        try:
            values = choice_accuracy(model, tokenizer, questions, **options)
        except NoPicturesError as error:
            raise ConfigError(f"fg_ovd: {error}") from error
        for difficulty, found in sets.choices.items():
            values[f"{difficulty}_left_out"] += len(found.bad)
        results["fg_ovd"] = {f"choices/{name}": value for name, value in values.items()}
    return results


def _choices(config: EvaluateConfig, folder: Path) -> dict[str, ChoiceSet]:
    found = {}
    for difficulty in fg_ovd.DIFFICULTIES:
        try:
            file = fg_ovd.fg_ovd_file(folder, difficulty)
        except FileNotFoundError:
            continue
        found[difficulty] = fg_ovd.load_fg_ovd(
            file, config.fg_ovd_images or folder, allow_outside_root=config.allow_outside_root
        )
    if not found:
        raise FileNotFoundError(f"fg_ovd: {folder} has no file of any difficulty")
    return found

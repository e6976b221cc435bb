"""``betaclip evaluate``: evaluates a checkpoint on the sets that the options name."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from betaclip.checkpoint import load_checkpoint
from betaclip.data.readers import fg_ovd
from betaclip.data.readers.class_folders import ClassFolders
from betaclip.data.registry import RETRIEVAL_SETS
from betaclip.data.transforms import EvaluationTransform
from betaclip.errors import ConfigError
from betaclip.evaluation.encode import NoPicturesError, log_unusable
from betaclip.evaluation.report import Results, table, write_json
from betaclip.evaluation.sets import EvaluationConfig, read_sets
from betaclip.evaluation.tasks.leak import leak
from betaclip.evaluation.tasks.multiple_choice import choice_accuracy
from betaclip.evaluation.tasks.retrieval import retrieval, texts_of_pictures
from betaclip.evaluation.tasks.scenes import evaluate_scenes
from betaclip.evaluation.tasks.zero_shot import TEMPLATES, zero_shot_accuracy
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup, initialized
from betaclip.settings import bounded, check_numbers

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Evaluate a checkpoint on the sets that the options name. Under torchrun, ranks share the work."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, a run's folder, or a file in the published layout."""
    output: Path | None = None
    """JSON file for the results."""
    head_width: int = bounded(64, at_least=1)
    """Width of the towers' attention heads, if the file has the published layout: no tensor shows it."""
    pool_heads: int = bounded(8, at_least=1)
    """Attention heads of the pooling block, likewise."""
    device: str = "auto"
    """auto takes a GPU if there is one."""


def evaluate(config: EvaluateConfig) -> Results:
    """Print a table, write the JSON file, and return shares and counts by set and name.

    Raises:
        ConfigError: no set is named, or a set, the checkpoint or the device does not exist.
    """
    with initialized(config.device) as (process_group, device):
        evaluator = Evaluator(config)
        if evaluator.is_empty:
            names = ("scenes", *RETRIEVAL_SETS, "fg_ovd")
            options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise ConfigError(f"nothing to evaluate: give {options} or --zero-shot")
        try:
            if config.output is not None:  # fails before hours of work, if it fails
                config.output.parent.mkdir(parents=True, exist_ok=True)
            model = load_checkpoint(
                config.checkpoint, device=device, head_width=config.head_width, pool_heads=config.pool_heads
            )
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
        if process_group.is_first:
            evaluator.log_unusable()
        results = evaluator(model, process_group)
        if process_group.is_first:
            print(table(results))
            if config.output is not None:
                write_json(results, config.output)
    return results


class Evaluator:
    """Evaluates models on the sets that the settings name, which are read once, before any long work.

    Raises:
        ConfigError: a set does not exist, or a number is out of range.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config, self.scenes = config, config.scenes or 0
        check_numbers(config)
        self.sets = read_sets(config)

    @property
    def is_empty(self) -> bool:
        return not (self.scenes or self.sets.retrieval or self.sets.choices or self.sets.classes)

    def log_unusable(self) -> None:
        """Log the samples that cannot be used, and missing files of FG-OVD."""
        for bad in self.sets.unusable:
            log_unusable(bad)
        for difficulty in fg_ovd.DIFFICULTIES:
            if self.sets.choices and difficulty not in self.sets.choices:
                _log.warning("left out the %s choices: no such file in %s", difficulty, self.config.fg_ovd)

    def __call__(self, model: BetaCLIP, process_group: ProcessGroup = SINGLE_PROCESS) -> Results:
        """Evaluate a model; by default, without the other ranks.

        Returns:
            Shares and counts by set and name, the same on every rank.

        Raises:
            ConfigError: none of a set's pictures can be read.
        """
        tokenizer = Tokenizer(model.context_length, keep_end=self.config.long_texts == "keep_end")
        conditioned = self.config.conditioned
        options: Any = {"batch_size": self.config.batch_size, "process_group": process_group}
        results: dict[str, dict[str, float]] = {}
        if self.scenes:
            results["scenes"] = evaluate_scenes(
                model, tokenizer, seed=self.config.seed, count=self.scenes, conditioned=conditioned, **options
            )
        for one in self.sets.retrieval:
            pictures, transform = texts_of_pictures(one), EvaluationTransform(model.image_size)
            try:
                values = retrieval(model, tokenizer, pictures, transform, conditioned=conditioned, **options)
            except NoPicturesError as error:
                raise ConfigError(f"{one.name}: {error}") from error
            values["left_out"] += len(one.missing)
            results[one.name] = {f"retrieval/{name}": value for name, value in values.items()}
            if conditioned:
                values = leak(model, tokenizer, pictures, transform, **options)
                results[one.name] |= {f"leak/{name}": value for name, value in values.items()}
        if self.sets.choices:
            results["fg_ovd"] = self._choices(model, tokenizer, options)
        if self.sets.classes is not None:
            results["zero_shot"] = self._classes(self.sets.classes, model, tokenizer, options)
        return results

    def _classes(self, classes: ClassFolders, model: BetaCLIP, tokenizer: Tokenizer, options: Any) -> dict[str, float]:
        templates, transform = TEMPLATES[self.config.zero_shot_templates], EvaluationTransform(model.image_size)
        try:
            values = zero_shot_accuracy(
                model, tokenizer, classes.pictures, classes.names, templates, transform, **options
            )
        except NoPicturesError as error:
            raise ConfigError(f"zero_shot: {error}") from error
        return {f"zero_shot/{name}": value for name, value in values.items()}

    def _choices(self, model: BetaCLIP, tokenizer: Tokenizer, options: Any) -> dict[str, float]:
        questions = [(subset, choice) for subset, found in self.sets.choices.items() for choice in found]
        try:
            values = choice_accuracy(model, tokenizer, questions, **options)
        except NoPicturesError as error:
            raise ConfigError(f"fg_ovd: {error}") from error
        for subset, found in self.sets.choices.items():
            values[f"{subset}_left_out"] += len(found.bad)
        return {f"choices/{name}": value for name, value in values.items()}

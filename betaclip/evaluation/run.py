"""``betaclip evaluate``: evaluates a checkpoint, and a model to compare it with, on the sets that the options name."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from betaclip.checkpoint import AVERAGED, Weights, load_checkpoint
from betaclip.data.readers import fg_ovd
from betaclip.data.readers.class_folders import ClassFolders
from betaclip.data.registry import RETRIEVAL_SETS
from betaclip.data.transforms import EvaluationTransform
from betaclip.errors import ConfigError
from betaclip.evaluation.encode import Encoder, NoPicturesError, Tokenize, Transform, log_unusable
from betaclip.evaluation.report import FORMATS, Results, table, write_results
from betaclip.evaluation.sets import EvaluationConfig, read_sets
from betaclip.evaluation.tasks.leak import leak
from betaclip.evaluation.tasks.multiple_choice import choice_accuracy
from betaclip.evaluation.tasks.ranking import RECALLS_AT
from betaclip.evaluation.tasks.retrieval import retrieval, texts_of_pictures
from betaclip.evaluation.tasks.scenes import evaluate_scenes
from betaclip.evaluation.tasks.zero_shot import TEMPLATES, zero_shot_accuracy
from betaclip.model.plain_clip import PlainClip, create_plain
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup, initialized
from betaclip.settings import bounded, check_numbers

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Evaluate a checkpoint, a CLIP of open_clip, or both, on the sets that the options name. Under torchrun, ranks
    share the work."""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """A checkpoint, a run's folder, a file in the published or in FLAIR's layout, or a folder that betaclip export
    wrote. May be left out if --model is given."""
    weights: Weights = "auto"
    """Which weights of a run with optimizer.ema_decay to take: ema, their average, raw, those after the last update, or
    auto, the average if there is one."""
    model: str | None = None
    """A CLIP or SigLIP to compare with: its name in open_clip (ViT-B-16, ViT-B-16-SigLIP), local-dir:FOLDER or
    hf-hub:OWNER/NAME. It has no text-conditioned results."""
    pretrained: str | None = None
    """Weights of --model: a tag of open_clip (openai) or a file in open_clip's layout."""
    output: Path | None = None
    """File for the results with their 95 % confidence intervals: its name ends in .json, .csv or .md."""
    intervals: bool = False
    """Show the 95 % confidence intervals (Wilson's score interval) in the printed tables, too."""
    head_width: int | None = bounded(None, at_least=1)
    """Width of the towers' attention heads, if the file has the published or FLAIR's layout and does not say it; by
    default 64."""
    pool_heads: int | None = bounded(None, at_least=1)
    """Attention heads of the pooling block, likewise; by default 8."""
    device: str = "auto"
    """cpu, cuda or auto, which takes a GPU if there is one."""


def evaluate(config: EvaluateConfig) -> Results:
    """Print tables, write the file, and return shares and counts by set and name.

    Returns:
        The results of the checkpoint under the names of the sets; those of ``model`` under "SET, MODEL WEIGHTS".

    Raises:
        ConfigError: nothing is named to evaluate or to evaluate on, or a set, the checkpoint, the model, its weights or
            the device does not exist.
    """
    with initialized(config.device) as (process_group, device):
        if config.output is not None and config.output.suffix not in FORMATS:
            raise ConfigError(f"output: expected a name that ends in {', '.join(FORMATS)}, got {config.output}")
        evaluator = Evaluator(config)
        if evaluator.is_empty:
            names = ("scenes", *RETRIEVAL_SETS, "fg_ovd")
            options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise ConfigError(f"nothing to evaluate: give {options} or --zero-shot")
        models = _models(config, device)
        if process_group.is_first:
            evaluator.log_unusable()
            if any(getattr(model, "averaged", False) for model in models.values()):
                print(AVERAGED)
        found = {label: evaluator(model, process_group) for label, model in models.items()}
        results = {
            f"{name}, {label}" if label else name: of_model[name]
            for name in dict.fromkeys(name for of_model in found.values() for name in of_model)
            for label, of_model in found.items()
            if name in of_model
        }
        if process_group.is_first:
            print(table(results, intervals=config.intervals))
            if config.output is not None:
                write_results(results, config.output)
    return results


def _models(config: EvaluateConfig, device: torch.device) -> dict[str, Encoder]:
    """The checkpoint's model under an empty name, and the one to compare with under its own.

    Raises:
        ConfigError: none is named, or one cannot be loaded.
    """
    if config.checkpoint is None and config.model is None:
        raise ConfigError("nothing to evaluate: give a checkpoint, --model and --pretrained, or both")
    if config.pretrained is not None and config.model is None:
        raise ConfigError(f"pretrained: {config.pretrained} are weights of --model, which is not given")
    models: dict[str, Encoder] = {}
    try:
        if config.output is not None:  # fails before hours of work, if it fails
            config.output.parent.mkdir(parents=True, exist_ok=True)
        if config.checkpoint is not None:
            models[""] = load_checkpoint(
                config.checkpoint, device=device, weights=config.weights,
                head_width=config.head_width, pool_heads=config.pool_heads,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if config.model is not None:
        try:
            plain = create_plain(config.model, config.pretrained).to(device)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: {error}") from error
        named = [] if config.model.startswith("{") else [config.model]  # its configuration would be a long name
        models[" ".join(Path(part).name for part in (*named, config.pretrained) if part)] = plain
    return models


class Evaluator:
    """Evaluates models on the sets that the settings name, which are read once, before any long work.

    Raises:
        ConfigError: a set does not exist, or a number is out of range.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config, self.scenes = config, config.scenes or 0
        check_numbers(config)
        if config.top_k is not None and config.top_k < RECALLS_AT[-1]:
            raise ConfigError(f"top_k: expected at least {RECALLS_AT[-1]}, the largest recall, got {config.top_k}")
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

    def __call__(self, model: Encoder, process_group: ProcessGroup = SINGLE_PROCESS) -> Results:
        """Evaluate a model; by default, without the other ranks.

        Returns:
            Shares and counts by set and name, the same on every rank.

        Raises:
            ConfigError: none of a set's pictures can be read.
        """
        config, sets = self.config, self.sets
        if isinstance(model, PlainClip):
            tokenizer: Tokenize = model.tokenizer
            transform: Transform = model.transform
        else:
            tokenizer = Tokenizer(model.context_length, keep_end=config.long_texts == "keep_end")
            transform = EvaluationTransform(model.image_size)
        options: Any = {"batch_size": config.batch_size, "process_group": process_group}
        ways: Any = {"conditioned": config.conditioned, "own_text": config.own_text, "top_k": config.top_k}
        results: dict[str, dict[str, float]] = {}
        if self.scenes:
            results["scenes"] = evaluate_scenes(
                model, tokenizer, seed=config.seed, count=self.scenes, **ways, **options
            )
        for one in sets.retrieval:
            pictures = texts_of_pictures(one)
            try:
                values = retrieval(model, tokenizer, pictures, transform, **ways, **options)
            except NoPicturesError as error:
                raise ConfigError(f"{one.name}: {error}") from error
            values["left_out"] += len(one.missing)
            results[one.name] = {f"retrieval/{name}": value for name, value in values.items()}
            if config.conditioned and not isinstance(model, PlainClip):
                values = leak(model, tokenizer, pictures, transform, **options)
                results[one.name] |= {f"leak/{name}": value for name, value in values.items()}
        if sets.choices and model.patch_grid == (0, 0):
            _log.warning("left out the choices: the vision tower has no patches in the space of the texts")
        elif sets.choices:
            results[sets.choices_name] = self._choices(model, tokenizer, options)
        if sets.classes is not None:
            results[sets.classes_name] = self._classes(sets.classes, model, tokenizer, transform, options)
        return results

    def _classes(
        self, classes: ClassFolders, model: Encoder, tokenizer: Tokenize, transform: Transform, options: Any
    ) -> dict[str, float]:
        templates = TEMPLATES[self.config.zero_shot_templates]
        try:
            values = zero_shot_accuracy(
                model, tokenizer, classes.pictures, classes.names, templates, transform, **options
            )
        except NoPicturesError as error:
            raise ConfigError(f"zero_shot: {error}") from error
        return {f"zero_shot/{name}": value for name, value in values.items()}

    def _choices(self, model: Encoder, tokenizer: Tokenize, options: Any) -> dict[str, float]:
        questions = [(subset, choice) for subset, found in self.sets.choices.items() for choice in found]
        try:
            values = choice_accuracy(model, tokenizer, questions, **options)
        except NoPicturesError as error:
            raise ConfigError(f"fg_ovd: {error}") from error
        for subset, found in self.sets.choices.items():
            values[f"{subset}_left_out"] += len(found.bad)
        return {f"choices/{name}": value for name, value in values.items()}

"""``betaclip train``: a training run, the evaluation of its model, and pictures of its attention."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from betaclip.checkpoint import load_checkpoint
from betaclip.data.scenes.dataset import TEST, scene
from betaclip.errors import ConfigError, OutputError
from betaclip.evaluation.report import table, write_json
from betaclip.evaluation.run import Evaluator
from betaclip.evaluation.sets import EvaluationConfig
from betaclip.files import lock_folder, reporting, write_atomically
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.page.page import FILE, write_page
from betaclip.process_group import ProcessGroup, initialized
from betaclip.settings import read
from betaclip.signals import stop_signals
from betaclip.training.artifacts import write_curves
from betaclip.training.config import RunConfig, TrainingConfig, check
from betaclip.training.trainer import Evaluated, Trainer
from betaclip.visualize import attention_figure

OURS, GLOBAL = "β-CLIP", "global loss only"
GLOBAL_FOLDER = "global_only"  # in the run's folder
DEFAULT_SCENES = 200
PICTURES, PHRASES_PER_PICTURE = 6, 7


@dataclass(frozen=True, kw_only=True)
class TrainEvaluationConfig(EvaluationConfig):
    """The sets to evaluate the model on, at the end and during the run; ``betaclip evaluate`` has the same options."""

    every: int | None = None
    """Updates between evaluations; by default only at the end."""
    scenes: int | None = None
    """Number of rendered scenes; by default 200 if the training data are scenes, else none."""
    conditioned: bool = False
    """Also evaluate text-conditioned retrieval, and the leak on retrieval sets; that on scenes always is."""


@dataclass(frozen=True)
class TrainConfig(TrainingConfig):
    """All settings of a run, with its evaluation."""

    evaluation: TrainEvaluationConfig = field(default_factory=TrainEvaluationConfig)


def main(config: TrainConfig) -> None:
    """Train, evaluate and draw; if asked to compare, train once more with the global loss alone.

    Raises:
        ConfigError: an invalid setting.
        NonFiniteError: a loss or gradient is not finite, and the run does not skip such updates.
        BadDataError: there are more bad data than the run allows.
        OutputError: the run's folder cannot be written.
        Stopped: a signal came; what was trained is saved.
    """
    with ExitStack() as stack:
        stack.enter_context(stop_signals())
        process_group, device = stack.enter_context(initialized(config.run.device))
        check(config, process_group.size)
        if config.run.name is None:
            name = process_group.gather_objects(time.strftime("%Y-%m-%d_%H-%M-%S"))[0]
            config = replace(config, run=replace(config.run, name=name))
        evaluator = create_evaluator(config)
        stack.enter_context(claim(config.run, process_group))
        runs = {OURS: train(config, evaluator, process_group, device)}
        compare = config.data.kind == "scenes" if config.run.compare_global is None else config.run.compare_global
        if compare and config.loss.beta_cal_weight:
            loss = replace(config.loss, global_weight=1.0, beta_cal_weight=0.0, conditioned_negatives=0, weights={})
            run = replace(config.run, folder=runs[OURS], name=GLOBAL_FOLDER)
            stack.enter_context(claim(run, process_group))
            runs[GLOBAL] = train(replace(config, loss=loss, run=run), evaluator, process_group, device)
        finish(config, runs, evaluator, process_group, device)


def create_evaluator(config: TrainConfig) -> Evaluator:
    """Read the sets that the settings name.

    Raises:
        ConfigError: a set does not exist, or a number is out of range.
    """
    chosen = config.evaluation
    if chosen.every is not None and chosen.every < 1:
        raise ConfigError(f"evaluation.every: expected at least 1, got {chosen.every}")
    if chosen.scenes is None and config.data.kind == "scenes":
        chosen = replace(chosen, scenes=DEFAULT_SCENES)
    try:
        return Evaluator(chosen)
    except ConfigError as error:
        raise ConfigError(f"evaluation: {error}") from error


@contextmanager
def claim(run: RunConfig, process_group: ProcessGroup) -> Iterator[None]:
    """Hold the run's folder on the first rank, so that no other run writes there; all ranks together.

    Raises:
        ConfigError: another run is at work there.
        OutputError: the folder cannot be created or written.
    """
    assert run.name is not None
    with ExitStack() as stack:
        error: ConfigError | OutputError | None = None
        if process_group.is_first:
            try:
                stack.enter_context(lock_folder(run.folder / run.name))
            except (ConfigError, OutputError) as found:
                error = found
        error = process_group.gather_objects(error)[0]  # no rank may wait for one that has left
        if error is not None:
            raise error
        yield


def train(config: TrainConfig, evaluator: Evaluator, process_group: ProcessGroup, device: torch.device) -> Path:
    """Train to the last step, from the start or from the latest checkpoint; return the run's folder."""
    evaluate = partial(_evaluate, evaluator)
    trainer = Trainer(config, process_group, device, evaluate=evaluate, evaluate_every=config.evaluation.every)
    trainer.train()
    return trainer.folder


def finish(
    config: TrainConfig, runs: dict[str, Path], evaluator: Evaluator, process_group: ProcessGroup, device: torch.device
) -> None:
    """Evaluate each run's last checkpoint on all ranks; the first rank prints and writes results and pictures."""
    models = {name: load_checkpoint(folder, device=device) for name, folder in runs.items()}
    results = {
        run if set_name == "scenes" else f"{set_name}, {run}": values
        for run, model in models.items()
        for set_name, values in evaluator(model, process_group).items()
    }
    if not process_group.is_first:
        return
    folder = runs[OURS]
    write_curves(runs, folder / "curves.png")
    if results:
        write_json(results, folder / "results.json")
        print(table(results))
    if config.data.kind == "scenes":
        for name, model in models.items():
            write_pictures(model, runs[name] / "attention", config.data.scenes_seed)
    settings = read(TrainConfig(), folder / "config.toml")  # with what the model's weights said
    write_page(folder / FILE, settings, runs, results, models[OURS], evaluator)
    print(f"{folder} has checkpoints, curves.png" + (", results.json" if results else ""))
    print(f"open {folder / FILE} in a browser")


def write_pictures(model: BetaCLIP, folder: Path, seed: int) -> None:
    """Draw the attention of some phrases over test scenes, with the boxes of the things that they name."""
    with reporting(folder):
        folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(model.context_length)
    for index in range(PICTURES):
        shown = scene(seed, index, model.image_size, TEST)
        phrases, boxes = shown.phrases[:PHRASES_PER_PICTURE], shown.boxes[:PHRASES_PER_PICTURE]
        figure = attention_figure(model, tokenizer, shown.image, phrases, boxes)
        with write_atomically(folder / f"scene_{index}.png") as file:
            figure.savefig(file, format="png")


def _evaluate(evaluator: Evaluator, model: BetaCLIP, process_group: ProcessGroup) -> Evaluated:
    results = evaluator(model, process_group)
    metrics = {f"{set_name}/{name}": v for set_name, values in results.items() for name, v in values.items()}
    return Evaluated(metrics, table(results))

"""``betaclip train``: a training run, the evaluation of its model, and pictures of its attention."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from betaclip.checkpoint import WEIGHTS_FILE, load_checkpoint, save_weights
from betaclip.data.scenes.dataset import TEST, scene
from betaclip.data.sentences import clean, split_sentences
from betaclip.data.transforms import UnreadableImageError, read_image
from betaclip.errors import ConfigError, OutputError
from betaclip.evaluation.report import Results, table, write_json
from betaclip.evaluation.run import Evaluator
from betaclip.evaluation.sets import EvaluationConfig
from betaclip.files import lock_folder, reporting, write_atomically
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.page.page import FILE, write_page
from betaclip.process_group import ProcessGroup, initialized
from betaclip.settings import bounded, read
from betaclip.signals import stop_signals
from betaclip.training.artifacts import write_curves
from betaclip.training.config import RunConfig, TrainingConfig, check, check_backend
from betaclip.training.log import write_final, write_log
from betaclip.training.trainer import Evaluated, Trainer
from betaclip.visualize import attention_figure

OURS, GLOBAL = "β-CLIP", "global loss only"
GLOBAL_FOLDER = "global_only"  # in the run's folder
DEFAULT_SCENES = 200
PHRASES_PER_PICTURE = 7
PICTURES_OF_AN_EVALUATION = 2  # at most, during the run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainEvaluationConfig(EvaluationConfig):
    """The sets to evaluate the model on, at the end and during the run; betaclip evaluate has the same options."""

    every: int | None = bounded(None, at_least=1)
    """Updates between evaluations; by default only at the end."""
    scenes: int | None = bounded(None, at_least=0)
    """Number of rendered scenes; by default 200 if the training data are scenes, else none."""
    pictures: int = bounded(6, at_least=0)
    """Number of pictures to draw the attention of at the end, and two of them for TensorBoard at every evaluation: of
    scenes if the training data are scenes, else of the first retrieval set."""
    conditioned: bool = False
    """Also evaluate text-conditioned retrieval, and the leak on retrieval sets. The leak on scenes is always
    measured."""


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
        check_backend(config.loss, device)
        if config.run.precision == "fp16" and device.type == "cpu" and process_group.is_first:
            _log.warning("run.precision: fp16 is much slower than fp32 on a CPU; take fp32 or bf16")
        if config.run.name is None:
            name = process_group.gather_objects(time.strftime("%Y-%m-%d_%H-%M-%S"))[0]
            config = replace(config, run=replace(config.run, name=name))
        evaluator = create_evaluator(config)
        stack.enter_context(claim(config.run, process_group))
        runs = {OURS: train(config, evaluator, process_group, device)}
        compare = config.data.kind == "scenes" if config.run.compare_global is None else config.run.compare_global
        if compare and config.loss.beta_cal_weight:
            loss = replace(config.loss, global_weight=1.0, beta_cal_weight=0.0, conditioned_negatives=0, text_queue=0,
                           sampled_pictures=None, weights={})  # fmt: skip
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
    evaluate = partial(_evaluate, config, evaluator)
    trainer = Trainer(config, process_group, device, evaluate=evaluate, evaluate_every=config.evaluation.every)
    trainer.train()
    return trainer.folder


def finish(
    config: TrainConfig, runs: dict[str, Path], evaluator: Evaluator, process_group: ProcessGroup, device: torch.device
) -> None:
    """Evaluate each run's last checkpoint on all ranks; the first rank prints and writes results and pictures."""
    models = {}
    for name, run_folder in runs.items():
        models[name] = load_checkpoint(run_folder, device=device, weights="raw")
        if config.optimizer.ema_decay is not None and (average := load_checkpoint(run_folder, device=device)).averaged:
            models[_averaged(name)] = average
    by_model = {name: evaluator(model, process_group) for name, model in models.items()}
    if not process_group.is_first:
        return
    folder = runs[OURS]
    write_curves(runs, folder / "curves.png")
    chosen, drawn = {name: models.get(_averaged(name), models[name]) for name in runs}, {}
    for name, run_folder in runs.items():
        save_weights(chosen[name], run_folder / WEIGHTS_FILE)
        drawn[name] = write_pictures(config, evaluator, chosen[name], run_folder / "attention")
        if config.run.tensorboard:
            found = by_model.get(_averaged(name), by_model[name])
            write_final(run_folder, read(TrainConfig(), run_folder / "config.toml"), _by_name(found))
    results = {
        name if set_name == "scenes" else f"{set_name}, {name}": values
        for name, sets in by_model.items()
        for set_name, values in sets.items()
    }
    if results:
        write_json(results, folder / "results.json")
    settings = read(TrainConfig(), folder / "config.toml")  # with what the model's weights said
    write_page(folder / FILE, settings, runs, results, chosen[OURS], evaluator)
    report = [table(results)] if results else []
    for text in [*report, _final_words(folder, bool(results), drawn[OURS], config.run.tensorboard)]:
        print(text)
        write_log(folder, text)


def _averaged(run: str) -> str:
    """The name of the averaged weights of a run."""
    return f"{run} (EMA)"


def _by_name(results: Results) -> dict[str, float]:
    return {f"{set_name}/{name}": value for set_name, values in results.items() for name, value in values.items()}


def _final_words(folder: Path, evaluated: bool, drawn: list[Path], tensorboard: bool) -> str:
    lines = {
        f"{folder}/{FILE}": "a page about this run, to open in a browser",
        f"{folder}/{WEIGHTS_FILE}": "the weights; betaclip.load and betaclip evaluate, visualize and export take it",
        f"{folder}/checkpoint_*.pt": "--run.resume continues from the last",
    }
    if evaluated:
        lines[f"{folder}/results.json"] = "these results"
    lines[f"{folder}/curves.png"] = "losses, scales, gradient norms and learning rates"
    if drawn:
        lines[str(drawn[0])] = "what each text attends to" + (f"; {len(drawn)} such pictures" if drawn[1:] else "")
    lines[f"{folder}/log.txt"] = "what this run said"
    if tensorboard:
        lines[f"tensorboard --logdir {folder}"] = "shows its curves and pictures"
    return "\n".join(f"{place}: {holds}" for place, holds in lines.items())


def write_pictures(config: TrainConfig, evaluator: Evaluator, model: BetaCLIP, folder: Path) -> list[Path]:
    """Draw the attention over the pictures that the settings ask for; returns the files."""
    files = []
    for name, figure in _figures(config, evaluator, model, config.evaluation.pictures):
        with reporting(folder):
            folder.mkdir(exist_ok=True)
        with write_atomically(folder / f"{name}.png") as file:
            figure.savefig(file, format="png")
        files.append(folder / f"{name}.png")
    return files


def _figures(config: TrainConfig, evaluator: Evaluator, model: BetaCLIP, count: int) -> Iterator[tuple[str, Figure]]:
    """The attention of some phrases over test scenes, with the boxes of the things that they name; or of the sentences
    of captions over the pictures of the first retrieval set."""
    tokenizer = Tokenizer(model.context_length)
    if config.data.kind == "scenes":
        for index in range(count):
            shown = scene(config.data.scenes_seed, index, model.image_size, TEST)
            phrases, boxes = shown.phrases[:PHRASES_PER_PICTURE], shown.boxes[:PHRASES_PER_PICTURE]
            yield f"scene_{index}", attention_figure(model, tokenizer, shown.image, phrases, boxes)
    elif evaluator.sets.retrieval:
        captions = dict(reversed(evaluator.sets.retrieval[0].pairs))  # the first of each picture
        for index, path in enumerate(list(reversed(captions))[:count]):
            texts = split_sentences(clean(captions[path]))[:PHRASES_PER_PICTURE]
            try:
                image = read_image(path)
            except UnreadableImageError:  # the evaluation has said so
                continue
            if texts:
                yield f"picture_{index}", attention_figure(model, tokenizer, image, texts)


def _evaluate(config: TrainConfig, evaluator: Evaluator, model: BetaCLIP, process_group: ProcessGroup) -> Evaluated:
    results = evaluator(model, process_group)

    def figures() -> dict[str, Figure]:
        # A sharded model's ranks are given a group of their own each, so that all of them draw, as they must.
        draws = config.run.tensorboard and process_group.is_first
        count = min(config.evaluation.pictures, PICTURES_OF_AN_EVALUATION) if draws else 0
        return {f"attention/{name}": figure for name, figure in _figures(config, evaluator, model, count)}

    return Evaluated(_by_name(results), table(results), figures)

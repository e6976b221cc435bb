"""The training loop."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import nvtx
import torch
from matplotlib.figure import Figure
from torch.distributed.fsdp import FSDPModule

from betaclip import checkpoint as checkpoints
from betaclip.data.batches import BadData, Batch
from betaclip.errors import ConfigError, Stopped
from betaclip.files import reporting, write_atomically
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, Sizes, check_config, create_model
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.published import read_training_state
from betaclip.settings import differences, filled, from_dict, to_dict, to_toml
from betaclip.signals import StopSignals, stop_signals
from betaclip.training import parallel
from betaclip.training.config import TrainingConfig, check_resume, check_schedules, is_fixed
from betaclip.training.data_source import create_data_source
from betaclip.training.ema import WeightAverage
from betaclip.training.freezing import freeze
from betaclip.training.header import first_batch, header
from betaclip.training.layer_rates import summary
from betaclip.training.log import Log, MetricsBuffer, write_log
from betaclip.training.objective import Objective
from betaclip.training.optimizers import create_optimizer, highest_rates
from betaclip.training.sampler import mix
from betaclip.training.step import TrainStep


class Evaluated(NamedTuple):
    """The result of an evaluation: values by name to log, a table to print, and what draws figures for TensorBoard."""

    metrics: dict[str, float]
    table: str
    figures: Callable[[], Mapping[str, Figure]] = dict


# The ranks of the group share the work; all of them get the result.
Evaluate = Callable[[BetaCLIP, ProcessGroup], Evaluated]


class Trainer:
    """A model in training, with everything that its checkpoints hold.

    Args:
        config: settings; ``run.name`` is given.
        evaluate: called every ``evaluate_every`` updates, except after the last.

    Raises:
        ConfigError: settings that do not fit each other, the data, or the checkpoint to resume from.
    """

    def __init__(
        self,
        config: TrainingConfig,
        process_group: ProcessGroup,
        device: torch.device,
        *,
        evaluate: Evaluate | None = None,
        evaluate_every: int | None = None,
    ) -> None:
        self.config, self.process_group, self.device = config, process_group, device
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        assert config.run.name is not None
        self.folder = config.run.folder / config.run.name
        self._notes: list[str] = []
        content = self._checkpoint()
        objective = Objective(config.loss, several_ranks=process_group.size > 1)
        released = config.run.continue_from
        weights = config.model if released is None else replace(config.model, pretrained=str(released))
        # Missing data are found before weights are fetched.
        sizes = check_model(weights if content is None else replace(weights, pretrained=None))
        self.data = create_data_source(config, sizes, process_group, device)
        torch.manual_seed(config.run.seed)
        self.model = _create_model(weights, content).to(device)
        # Save the config as resolved from the weights, not as given.
        self.config = config = replace(config, model=replace(self.model.config, pretrained=config.model.pretrained))
        freeze(self.model, config, objective)
        if config.optimizer.layer_decay != 1 and process_group.is_first:
            self._note(summary((name for name, _ in self.model.named_parameters()), config.optimizer.layer_decay))
        if config.run.compile:
            compile_(self.model)
        self.steps = config.run.steps or config.run.epochs * self.data.steps_per_epoch
        check_schedules(config.optimizer, self.steps)
        wrapped = parallel.wrap(self.model, config.run.parallel, process_group)
        self.optimizer = create_optimizer(self.model, config.optimizer)
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)
        self.train_step = TrainStep(self.model, wrapped, objective, self.optimizer, config, process_group, self.steps)
        self.metrics = MetricsBuffer(self.train_step.columns, self.train_step.must_be_finite)
        self.bad = BadData(config.data.bad_limit)
        self.step = self._saved_step = 0  # a run without a step needs no checkpoint to start again
        self._evaluation_due = False
        torch.manual_seed(mix(config.run.seed, process_group.rank))
        if content is not None:
            self._restore(content, checkpoints.checkpoint_path(self.folder, content["step"]))
        elif released is not None:
            self._continue_from(released)

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Stopped: a signal came on any rank; a checkpoint is written.
        """
        self.model.train()
        with stop_signals() as signals, signals.deferred():
            log = self._open_log() if self.process_group.is_first else None
            try:
                number = self._train(log, signals)
            finally:
                if log is not None:
                    log.close()
            if number:
                raise Stopped(number, self.folder, self.step)

    def _open_log(self) -> Log:
        with reporting(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.folder / "config.toml") as file:
            file.write(to_toml(self.config).encode())
        log = Log(self.folder, self.config, self.steps, self.step)
        for note in self._notes:
            write_log(self.folder, note)
        log.say(header(
            self.folder, self.config, self.model, self.data, self.steps, self.process_group, self.device
        ))  # fmt: skip
        return log

    def _train(self, log: Log | None, signals: StopSignals) -> int:
        """Train to the last step or to a signal on any rank, and save; returns the signal's number, or 0."""
        if self._evaluation_due and self.evaluate is not None:
            self._evaluate(log, signals)
            self._saved_step = -1  # the checkpoint says that it is due
        self.metrics.start_clock()
        batches = timed(self.data.batches(self.step, self.steps))
        first = self.step
        while True:
            waited = _next(batches, signals) if self.step < self.steps else None
            # A rank that waits for data can tell the others only here, before they need its share of the step.
            number = int(self.process_group.max(torch.tensor(signals.number, device="cpu")))
            if number or self.step == self.steps:
                break
            assert waited is not None, "the data ended before the last step"
            if log is not None and self.step == first:
                log.say(first_batch(waited[0], self.process_group))
            self._update(*waited)
            self._after_step(log, signals)
        if self.step != self._saved_step:
            if self.config.run.non_finite == "stop":
                self.metrics.stop_if_not_finite(self.step, self.process_group.rank, self.folder)
            self.save()
        return number

    def _update(self, batch: Batch, waited_s: float) -> None:
        self.bad.add(batch.bad, len(batch.images))
        images = self.data.images(self.step)
        self.metrics.add(self.train_step(batch, self.step, images), batch.paths, images, waited_s)
        if self.average is not None:
            self.average.update()
        self.step += 1

    def _after_step(self, log: Log | None, signals: StopSignals) -> None:
        """Log, evaluate and save where it is due."""
        run, last = self.config.run, self.step == self.steps
        logs = last or self.step % run.log_every == 0
        saves = last or self.step % run.checkpoint_every == 0
        if log is not None:
            log.advance()
        # On a GPU, reading the measured values would make every step wait for the device.
        if run.non_finite == "stop" and (logs or saves or self.device.type == "cpu"):
            self.metrics.stop_if_not_finite(self.step, self.process_group.rank, self.folder)
        if logs:
            self._report(log)
        if self.evaluate is not None and self.evaluate_every and self.step % self.evaluate_every == 0 and not last:
            self._evaluation_due = True
            self._evaluate(log, signals)
        if saves:
            self.save()

    def save(self) -> None:
        """Write a checkpoint; all ranks together."""
        content: dict[str, Any] = {
            "betaclip": checkpoints.FORMAT,
            "step": self.step,
            "config": to_dict(self.config),
            "order": self.data.order,
            **checkpoints.model_and_optimizer(self.model, self.optimizer),
            "scaler": self.train_step.scaler.state_dict(),
            "loss_terms": self.train_step.objective.state(),
            "columns": self.metrics.columns,
            "interval": self.metrics.read()[0],
            "evaluation_due": self._evaluation_due,
            "random": self.process_group.gather_objects(checkpoints.random_states()),
        }
        if self.average is not None:
            content["ema"] = self.average.state()
        if self.process_group.is_first:
            checkpoints.write(checkpoints.checkpoint_path(self.folder, self.step), content, self.config.run.keep)
        self._saved_step = self.step
        self.process_group.barrier()

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        self._check_resumable(content)
        if self.process_group.is_first:
            for change in self._changes(content):
                self._note(f"changed since the checkpoint: {change}")
            checkpoints.set_aside_later(self.folder, content["step"])
        self.step = self._saved_step = content["step"]
        self._evaluation_due = content.get("evaluation_due", False)
        try:
            checkpoints.restore(self.model, self.optimizer, content)
            if self.average is not None:  # without one in the checkpoint, it starts from these weights
                self.average.restore(content["model"] | content.get("ema", {}))
            self.train_step.scaler.load_state_dict(content["scaler"])
            self.metrics.restore(content["interval"].to(self.device))
            self.train_step.objective.restore(content.get("loss_terms", {}), self.device)
            if self.process_group.rank < len(content["random"]):
                checkpoints.set_random_states(content["random"][self.process_group.rank])
        except Exception as error:  # PyTorch raises anything for states that are not its own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"run.resume: {path} does not fit this run: {reason}") from error

    def _changes(self, content: dict[str, Any]) -> list[str]:
        """The settings that differ from those of the checkpoint. What its version did not have was as by default."""
        return list(differences(filled(content["config"], to_dict(type(self.config)())), to_dict(self.config)))

    def _check_resumable(self, content: dict[str, Any]) -> None:
        """Raise ConfigError for a run that would not be the checkpoint's run."""
        fixed = [change for change in self._changes(content) if is_fixed(change.partition(":")[0])]
        if fixed:
            raise ConfigError(
                f"run.resume: {', '.join(fixed)} since the checkpoint, which makes it another run; start a new "
                "one, with model.pretrained for the weights"
            )
        if self.train_step.scaler.is_enabled() and not content["scaler"]:
            raise ConfigError(
                f"run.resume: run.precision: {content['config'].get('run', {}).get('precision')} -> fp16 since the "
                "checkpoint, which has no gradient scaler to continue with; take fp32 or bf16, or start a new run"
            )
        if content["columns"] != self.metrics.columns:
            raise ConfigError("run.resume: the loss terms changed since the checkpoint; start a new run")
        changed = list(differences(content["order"], self.data.order))
        if changed:
            raise ConfigError(
                f"run.resume: {', '.join(changed)} since the checkpoint, which would continue at another place in the "
                "data; start a new run, with model.pretrained for the weights"
            )
        if content["step"] > self.steps:
            raise ConfigError(
                f"run.resume: the checkpoint is of step {content['step']}, beyond the run's {self.steps} steps"
            )

    def _continue_from(self, path: Path) -> None:
        """Go on after the last epoch of a checkpoint of the released training code, whose weights are loaded."""
        try:
            state = read_training_state(path)
            checkpoints.set_moments(self.model, self.optimizer, state.moments)
        except (OSError, ValueError) as error:
            raise ConfigError(f"run.continue_from: {error}") from error
        self.step = state.epochs * self.data.steps_per_epoch
        if self.step >= self.steps:
            raise ConfigError(
                f"run.continue_from: {path} is after epoch {state.epochs}, update {self.step} of these data; "
                f"expected a longer run, got {self.steps} updates"
            )

    def _checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to resume from, if there is one."""
        check_resume(self.config.run)
        path, content = _read_checkpoint(self.folder, self.process_group)
        if self.process_group.is_first and path is not None:
            self._note(f"resuming from {path}")
        return content

    def _note(self, text: str) -> None:
        """Print before there is a log file, which gets it later."""
        print(text)
        self._notes.append(text)

    def _report(self, log: Log | None) -> None:
        if log is not None:
            metrics = self.metrics.means(self.device)
            metrics["epoch"] = self.step / self.data.steps_per_epoch
            rates = highest_rates(self.optimizer)
            log.write(self.step, metrics | {f"lr_{part}": rate for part, rate in rates.items()})
        self.metrics.clear()

    def _evaluate(self, log: Log | None, signals: StopSignals) -> None:
        """A signal abandons the evaluation, which is then made when the run is resumed; with several ranks, which must
        stay together, it is finished."""
        assert self.evaluate is not None
        # Every call of a sharded model is a collective, so that all ranks must evaluate the same samples.
        group = SINGLE_PROCESS if isinstance(self.model, FSDPModule) else self.process_group
        states = checkpoints.random_states()  # evaluation must not change the run
        weights_to_evaluate: list[AbstractContextManager[None]] = [nullcontext()]
        if self.average is not None:
            weights_to_evaluate.append(self.average.applied())
        found = []
        try:
            for weights in weights_to_evaluate:
                with weights, signals.interruptible() if self.process_group.size == 1 else nullcontext():
                    found.append(self.evaluate(self.model, group))
                    if weights is weights_to_evaluate[-1]:
                        figures = found[-1].figures()
        except Stopped:
            return
        finally:
            checkpoints.set_random_states(states)
        self._evaluation_due = False
        if log is not None:
            metrics = found[0].metrics | {f"ema/{name}": v for one in found[1:] for name, v in one.metrics.items()}
            tables = "\nwith averaged weights (EMA):\n".join(one.table for one in found)
            log.write_evaluation(self.step, metrics, tables, figures)


def _read_checkpoint(folder: Path, process_group: ProcessGroup) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to resume from and its content, if there is one; the first rank chooses, and all ranks read."""
    path, content, failed = None, None, None
    if process_group.is_first:
        try:
            path, content = checkpoints.read_latest(folder, checkpoints.RUN_KEYS) or (None, None)
        except (OSError, ValueError) as error:
            failed = str(error)
    path = process_group.gather_objects(path)[0]
    if path is not None and content is None:
        try:
            content = checkpoints.read(path, checkpoints.RUN_KEYS)
        except (OSError, ValueError) as error:
            failed = str(error)
    for message in process_group.gather_objects(failed):
        if message is not None:
            raise ConfigError(f"run.resume: {message}")
    return path, content


def check_model(config: ModelConfig) -> Sizes:
    """The sizes of a model's inputs, or ConfigError."""
    try:
        return check_config(config)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _create_model(config: ModelConfig, content: dict[str, Any] | None) -> BetaCLIP:
    """When resuming, the model is built without pretrained weights; the checkpoint supplies them."""
    try:
        known = None
        if content is not None:
            known = from_dict(ModelConfig(), content["config"]["model"])
            config = replace(config, pretrained=None)
        elif config.pretrained is not None and Path(config.pretrained).is_file():
            known = checkpoints.model_config(Path(config.pretrained))
        if known is not None:
            config = replace(config, quick_gelu=known.quick_gelu)
        return create_model(config)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"model: {error}") from error


def compile_(model: BetaCLIP) -> None:
    """Compile the part with the same shapes in every batch: the vision tower's blocks."""
    for block in model.clip.visual.transformer.resblocks:
        block.compile()


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches, each with the seconds that it was waited for."""
    while True:
        begin = time.perf_counter()
        with nvtx.annotate("data", domain="betaclip"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begin


def _next(batches: Iterator[tuple[Batch, float]], signals: StopSignals) -> tuple[Batch, float] | None:
    """The next batch, with its seconds; None when a signal comes before it or there is none."""
    try:
        with signals.interruptible():
            return next(batches, None)
    except Stopped:
        return None

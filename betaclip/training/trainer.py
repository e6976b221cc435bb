"""The training loop: `betaclip train`."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import nvtx
import torch
from torch.distributed.fsdp import FSDPModule

from betaclip import checkpoint as checkpoints
from betaclip.data.batches import BadData, Batch
from betaclip.errors import ConfigError, Stopped
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.process_group import ProcessGroup
from betaclip.settings import differences, from_dict, to_dict, to_toml
from betaclip.training import parallel
from betaclip.training.config import TrainConfig, check_schedules
from betaclip.training.data_source import create_data_source
from betaclip.training.evaluation import Evaluation
from betaclip.training.log import Log, MetricsBuffer
from betaclip.training.optimizers import create_optimizer
from betaclip.training.sampler import mix
from betaclip.training.step import TrainStep, create_objective, freeze_unused


class Trainer:
    """A model in training, with all that its checkpoints hold."""

    def __init__(self, config: TrainConfig, process_group: ProcessGroup, device: torch.device) -> None:
        self.config, self.process_group, self.device = config, process_group, device
        assert config.run.name is not None
        self.folder = config.run.folder / config.run.name
        content = self._checkpoint()
        torch.manual_seed(config.run.seed)
        self.model = _create_model(config.model, content).to(device)
        # What the weights have settled is what checkpoints are of.
        self.config = config = replace(config, model=replace(self.model.config, pretrained=config.model.pretrained))
        objective = create_objective(config, process_group)
        freeze_unused(self.model, objective)
        if config.run.compile:
            compile_(self.model)
        self.data = create_data_source(config, self.model, process_group, device)
        self.steps = config.run.steps or config.run.epochs * self.data.steps_per_epoch
        check_schedules(config.optimizer, self.steps)
        self.evaluation = Evaluation(config)
        wrapped = parallel.wrap(self.model, config.run.parallel, process_group)
        self.optimizer = create_optimizer(self.model, config.optimizer)
        self.train_step = TrainStep(self.model, wrapped, objective, self.optimizer, config, process_group, self.steps)
        self.metrics = MetricsBuffer(self.train_step.columns, self.train_step.must_be_finite)
        self.bad = BadData(config.data.bad_limit)
        self.step = 0
        torch.manual_seed(mix(config.run.seed, process_group.rank))
        if content is not None:
            self._restore(content)

    def train(self) -> None:
        """All steps that are left."""
        run, every = self.config.run, self.config.evaluation.every
        self.model.train()
        if self.process_group.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(to_toml(self.config))
        log = Log(self.folder, self.config, self.steps, self.step) if self.process_group.is_first else None
        try:
            with terminations() as terminated:
                self.metrics.start_clock()
                for batch, waited_s in timed(self.data.batches(self.step, self.steps)):
                    self.bad.add(batch.bad)
                    images = self.data.images(self.step)
                    self.metrics.add(self.train_step(batch, self.step, images), batch.paths, images, waited_s)
                    self.step += 1
                    stop = self.process_group.any(terminated.is_set())
                    last = self.step == self.steps
                    if log is not None:
                        log.advance()
                    logs = last or self.step % run.log_every == 0
                    saves = last or stop or self.step % run.checkpoint_every == 0
                    # On a GPU, reading what the device has measured would make every step wait for it.
                    if run.non_finite == "stop" and (logs or saves or self.device.type == "cpu"):
                        self.metrics.stop_if_not_finite(self.step, self.process_group.rank, self.folder)
                    if logs:
                        self._report(log)
                    if every is not None and self.step % every == 0 and not last:
                        self._evaluate(log)
                    if saves:
                        self.save()
                    if stop and not last:
                        raise Stopped(self.folder, self.step)
        finally:
            if log is not None:
                log.close()

    def save(self) -> None:
        """Write a checkpoint; all ranks together."""
        content: dict[str, Any] = {
            "betaclip": 1,
            "step": self.step,
            "config": to_dict(self.config),
            "order": self.data.order,
            **checkpoints.model_and_optimizer(self.model, self.optimizer),
            "scaler": self.train_step.scaler.state_dict(),
            "columns": self.metrics.columns,
            "interval": self.metrics.read()[0],
            "random": self.process_group.gather_objects(checkpoints.random_states()),
        }
        if self.process_group.is_first:
            checkpoints.write(checkpoints.checkpoint_path(self.folder, self.step), content, self.config.run.keep)
        self.process_group.barrier()

    def _restore(self, content: dict[str, Any]) -> None:
        if content["columns"] != self.metrics.columns:
            raise ConfigError("run.resume: the losses are others since the checkpoint. Start another run")
        changed = list(differences(content["order"], self.data.order))
        if changed:
            raise ConfigError(
                f"run.resume: {', '.join(changed)} since the checkpoint: its place in the data means nothing now. "
                "Start another run, with model.pretrained for the weights"
            )
        if content["step"] > self.steps:
            raise ConfigError(f"run.resume: the checkpoint is of step {content['step']}, beyond the run's {self.steps}")
        if self.process_group.is_first:
            for change in differences(content["config"], to_dict(self.config)):
                print(f"changed since: {change}")
        self.step = content["step"]
        checkpoints.restore(self.model, self.optimizer, content)
        self.train_step.scaler.load_state_dict(content["scaler"])
        self.metrics.rows = list(content["interval"].to(self.device))
        self.metrics.paths = [[] for _ in self.metrics.rows]
        if self.process_group.rank < len(content["random"]):
            checkpoints.set_random_states(content["random"][self.process_group.rank])

    def _checkpoint(self) -> dict[str, Any] | None:
        """What to go on from, if anything; the settings are printed."""
        found = self.process_group.gather_objects(checkpoints.latest(self.folder))[0]
        if found is not None and not self.config.run.resume:
            raise ConfigError(f"run.name: {self.folder} has a run already; --run.resume to go on, or another name")
        content = None if found is None else checkpoints.read(found)
        if self.process_group.is_first:
            print(to_toml(self.config))
            if found is not None:
                print(f"going on from {found}")
        return content

    def _report(self, log: Log | None) -> None:
        if log is not None:
            metrics = self.metrics.metrics(self.device)
            metrics["epoch"] = self.step / self.data.steps_per_epoch
            rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
            log.write(self.step, metrics | {f"lr_{part}": rate for part, rate in rates.items()})
        self.metrics.clear()

    def _evaluate(self, log: Log | None) -> None:
        states = checkpoints.random_states()  # looking at a run must not change it
        results = self.evaluation(self.model, self.process_group, alike=isinstance(self.model, FSDPModule))
        checkpoints.set_random_states(states)
        if log is not None:
            log.write_results(self.step, results)


def _create_model(config: ModelConfig, content: dict[str, Any] | None) -> BetaCLIP:
    """Of a checkpoint that goes on, without weights: it brings them later."""
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
    """Compile what has the same shapes in every batch: the blocks of the vision tower."""
    for block in model.clip.visual.transformer.resblocks:
        block.compile()


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches, and how long each was waited for."""
    while True:
        begin = time.perf_counter()
        with nvtx.annotate("data", domain="betaclip"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begin


@contextmanager
def terminations() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of what it does otherwise."""
    event = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()

    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody listen
        yield event
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)

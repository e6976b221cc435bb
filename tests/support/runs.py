"""Runs of a tiny model on noise, in place of the model and the data that the settings name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import TinyDataset, tiny_model
from torch import nn

from betaclip.data.registry import DataConfig
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.training import trainer
from betaclip.training.config import GroupConfig, LossConfig, OptimizerConfig, RunConfig, TrainingConfig
from betaclip.training.log import read_metrics
from betaclip.training.step import TrainStep
from betaclip.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 9
LOSS = LossConfig(beta=0.1)
MEASURED = ("loss", "global_loss", "beta_cal_loss", "logit_scale", "pool_logit_scale", "norm_backbone", "norm_pool")


def config(folder: Path, name: str = "run", loss: LossConfig = LOSS, **run: Any) -> TrainingConfig:
    options: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "log_every": 1, "workers": 0, "tensorboard": False}
    options |= run
    return TrainingConfig(
        loss=loss,
        optimizer=OptimizerConfig(GroupConfig(1e-3, 1e-5, warmup=1), GroupConfig(1e-3, 1e-4, warmup=0), eps=1e-3),
        run=RunConfig(folder=folder, name=name, **options),
    )


def put_tiny(patch: Callable[[Any, str, Any], None], dataset: TinyDataset | None = None, dropout: float = 0.2) -> None:
    def create_model(config: object) -> BetaCLIP:
        model = tiny_model()
        model.pool.mlp.append(nn.Dropout(dropout))  # something random in every step
        return model

    patch(trainer, "create_model", create_model)
    patch(DataConfig, "create", lambda *_, **__: dataset or TinyDataset(14))


@contextmanager
def tiny_runs() -> Iterator[None]:
    """Replace the model and data of the settings, and use one thread, so that processes compute alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            put_tiny(patch.setattr)
            yield
    finally:
        torch.set_num_threads(threads)


def train(settings: TrainingConfig, process_group: ProcessGroup = SINGLE_PROCESS, **options: Any) -> Trainer:
    run = Trainer(settings, process_group, CPU, **options)
    run.train()
    return run


def at_step(number: int, do: Callable[[], None]) -> Callable[..., Any]:
    """``TrainStep.__call__`` that does something first in one step."""
    call = TrainStep.__call__

    def patched(self: TrainStep, batch: Any, step: int, images: int) -> Any:
        if step == number:
            do()
        return call(self, batch, step, images)

    return patched


def measured(run: Trainer) -> list[list[float]]:
    rows = read_metrics(run.folder / "metrics.jsonl")
    return [[row[name] for name in MEASURED] for row in rows if "loss" in row]


def assert_same_run(ours: Trainer, truth: Trainer) -> None:
    """Bit for bit: everything that was logged, and the parameters at the end."""
    assert measured(ours) == measured(truth) and len(measured(truth)) == STEPS
    for (name, a), t in zip(ours.model.named_parameters(), truth.model.parameters(), strict=True):
        assert torch.equal(a, t), name


def averaged(settings: TrainingConfig) -> TrainingConfig:
    return replace(settings, optimizer=replace(settings.optimizer, ema_decay=0.7))

"""Training steps of a tiny model."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from betaclip.data.batches import Batch
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import SINGLE_PROCESS
from betaclip.training.config import GroupConfig, LossConfig, OptimizerConfig, RunConfig, TrainingConfig
from betaclip.training.freezing import freeze
from betaclip.training.objective import Objective
from betaclip.training.optimizers import create_optimizer
from betaclip.training.step import TrainStep

# Rates at which one update changes parameters by more than rounding; large eps: no sign of a gradient that is 0.
OPTIMIZER = OptimizerConfig(
    backbone=GroupConfig(1e-3, 1e-3, warmup=0, clip_norm=0.5),
    pool=GroupConfig(3e-3, 3e-3, warmup=0),
    eps=1e-4,
    weight_decay=0.1,
)


def config(**run: Any) -> TrainingConfig:
    # Without other pictures, which are drawn within a micro-batch.
    return TrainingConfig(loss=LossConfig(beta=0.1), optimizer=OPTIMIZER, run=RunConfig(**run))


def create_step(model: BetaCLIP, settings: TrainingConfig) -> TrainStep:
    objective = Objective(settings.loss)
    freeze(model, settings, objective)
    return TrainStep(model, model, objective, create_optimizer(model, settings.optimizer), settings, SINGLE_PROCESS, 10)


def double(batch: Batch) -> Batch:
    return replace(batch, images=batch.images.double())


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny import tiny_batch, tiny_model
from torch import Tensor, nn

from betaclip.data.batches import Batch
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import SINGLE_PROCESS
from betaclip.training.config import GroupConfig, LossConfig, OptimizerConfig, RunConfig, TrainConfig
from betaclip.training.optimizers import create_optimizer
from betaclip.training.step import TrainStep, create_objective, freeze_unused

# Rates at which one update changes parameters by more than rounding; large eps: no sign of a gradient that is 0.
OPTIMIZER = OptimizerConfig(
    backbone=GroupConfig(1e-3, 1e-3, clip_norm=0.5), pool=GroupConfig(3e-3, 3e-3), eps=1e-4, weight_decay=0.1
)


def config(**run: Any) -> TrainConfig:
    return TrainConfig(optimizer=OPTIMIZER, run=RunConfig(**run))


def create_update(model: BetaCLIP, settings: TrainConfig) -> TrainStep:
    objective = create_objective(settings, SINGLE_PROCESS)
    freeze_unused(model, objective)
    return TrainStep(model, model, objective, create_optimizer(model, settings.optimizer), settings, SINGLE_PROCESS, 10)


def double(batch: Batch) -> Batch:
    return replace(batch, images=batch.images.double())


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_cached_micro_batches_equal_the_whole_batch():
    batch = double(tiny_batch(7))
    results, rows = [], []
    for size in (None, 3, 1):
        model = tiny_model().double()
        update = create_update(model, config(micro_batch_size=size))
        rows.append(torch.stack([update(batch, step, 7) for step in range(2)]))
        results.append(parameters(model))
    assert update.columns == [
        "loss", "global_loss", "beta_cal_loss", "logit_scale", "pool_logit_scale", "norm_backbone", "norm_pool",
    ]  # fmt: skip
    assert (rows[0][0] != rows[0][1]).all()  # everything moves
    for result, row in zip(results[1:], rows[1:], strict=True):
        assert_same(result, results[0], 1e-12)
        torch.testing.assert_close(row, rows[0], atol=1e-6, rtol=0)  # the losses of a row are float32


def test_accumulation_is_the_mean_of_losses():
    batch = double(tiny_batch(6))
    model = tiny_model().double()
    row = create_update(model, config(micro_batch_size=3, accumulation="mean"))(batch, 0, 6)
    losses, other = [], tiny_model().double()
    objective = create_objective(config(), SINGLE_PROCESS)
    for begin in (0, 3):
        part = batch.of_images(begin, begin + 3)
        loss = objective(other(part.images, part.texts))["loss"]
        (loss / 2).backward()
        losses.append(loss.item())
    assert row[0].item() == pytest.approx(sum(losses) / 2)
    norm = torch.stack([p.grad.norm() for n, p in other.named_parameters() if not n.startswith("pool.")]).norm()
    assert row[5].item() == pytest.approx(norm.item())


def test_global_loss_alone():
    """Only captions are encoded, and the pooling block stays as it is."""
    batch = tiny_batch(5)
    model = tiny_model()
    before = parameters(model)
    update = create_update(model, replace(config(), loss=LossConfig(beta_cal_weight=0.0)))
    encoded = []
    model.register_forward_pre_hook(lambda module, arguments: encoded.append(arguments[1]))
    update(batch, 0, 5)
    assert update.columns == ["loss", "global_loss", "logit_scale", "pool_logit_scale", "norm_backbone"]
    assert len(encoded[0].lengths) == 5 < len(batch.texts.lengths)
    changed = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    assert changed and not any(name.startswith("pool.") for name in changed)


def test_beta_cal_alone():
    model = tiny_model()
    before = model.logit_scale.item()
    update = create_update(model, replace(config(), loss=LossConfig(global_weight=0.0)))
    update(tiny_batch(5), 0, 5)
    assert "global_loss" not in update.columns and model.logit_scale.item() == before


def test_scales_are_clamped():
    model = tiny_model()
    update = create_update(model, replace(config(), optimizer=replace(OPTIMIZER, backbone=GroupConfig(9.0, 9.0))))
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    for step in range(3):
        row = update(tiny_batch(5), step, 5)
    assert 1 <= row[3].item() <= 100.001 and 0 <= model.logit_scale.item() <= 4.6052


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_update_that_is_not_finite_is_left_out(precision):
    """Parameters, moments and their step count stay; the next update is as if it had not been."""
    model, other = tiny_model(), tiny_model()
    update, truth = (create_update(m, config(precision=precision)) for m in (model, other))
    if precision == "fp16":
        for u in (update, truth):
            u.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    bad = tiny_batch(5)
    bad.images[2, 0, 0, 0] = torch.nan
    rows = [update(tiny_batch(5), 0, 5), update(bad, 1, 5), update(tiny_batch(5), 1, 5)]
    assert rows[0].isfinite().all() and rows[1][0].isnan() and rows[2].isfinite().all()
    for step in range(2):
        truth(tiny_batch(5), step, 5)
    # The scaler halves its scale after the bad one, which changes the rounding of numbers near 0.
    assert_same(parameters(model), parameters(other), 0 if precision == "fp32" else 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(precision):
    """Near float32's losses and norms, with parameters that stay float32."""
    truth = create_update(tiny_model(), config())(tiny_batch(6), 0, 6)
    model = tiny_model()
    update = create_update(model, config(precision=precision, micro_batch_size=4))
    if precision == "fp16":
        assert update.scaler.is_enabled()
        update.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # the usual 2¹⁶ may overflow in a first step
    row = update(tiny_batch(6), 0, 6)
    torch.testing.assert_close(row, truth, atol=0, rtol=0.1 if precision == "bf16" else 0.02)
    assert not torch.equal(row[:3], truth[:3])
    assert {p.dtype for p in model.parameters()} == {torch.float32}

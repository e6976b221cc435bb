from dataclasses import replace
from pathlib import Path

import pytest
import torch

from betaclip.errors import ConfigError
from betaclip.model.beta_clip import ModelConfig
from betaclip.training.config import (
    GroupConfig,
    LockConfig,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    check,
    check_backend,
    check_schedules,
    is_fixed,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "run.batch_size: expected at least 4, one for each rank, got 3"),
        ({"micro_batch_size": 0}, "run.micro_batch_size: expected at least 1, got 0"),
        ({"chunk_tokens": 0}, "run.chunk_tokens: expected at least 1, got 0"),
        ({"chunk_tokens": 9, "micro_batch_size": 4}, "run.chunk_tokens: expected no run.micro_batch_size .* got 4"),
        ({"chunk_tokens": 9, "accumulation": "mean"}, "run.chunk_tokens: expected run.accumulation grad_cache"),
        ({"steps": -1}, "run.steps: expected at least 1, got -1"),
        ({"workers": -1}, "run.workers: expected at least 0, got -1"),
        ({"resume": True}, "run.resume: expected run.name with it"),
        ({"parallel": "fsdp", "precision": "fp16"}, "run.precision: fp16"),
    ],
)
def test_check(change, message):
    config = TrainingConfig()
    check(config, ranks=4)
    with pytest.raises(ConfigError, match=message):
        check(replace(config, run=replace(config.run, **change)), ranks=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lock": LockConfig(image_unlocked_groups=2)}, "lock.image_unlocked_groups: expected lock.image with it"),
        ({"lock": LockConfig(text_unlocked_layers=2)}, "lock.text_unlocked_layers: expected lock.text with it"),
        (
            {"lock": LockConfig(image=True, text_freeze_layer_norm=False)},
            "lock.text_freeze_layer_norm: expected lock.text",
        ),
        ({"lora": LoraConfig(alpha=4.0)}, "lora.rank: expected at least 1 with other settings of lora, got 0"),
        ({"lora": LoraConfig(rank=-1)}, "lora.rank: expected at least 0, got -1"),
        ({"lora": LoraConfig(rank=2), "lock": LockConfig(text=True)}, "lora.rank: expected no lock.image or lock.text"),
        ({"lora": LoraConfig(rank=2, dropout=1.0)}, "lora.dropout: expected at least 0 and less than 1, got 1"),
        ({"lora": LoraConfig(rank=2, alpha=0.0)}, "lora.alpha: expected more than 0, got 0"),
        ({"lora": LoraConfig(rank=2, targets=())}, "lora.targets: expected at least one name"),
        (
            {"optimizer": OptimizerConfig(layer_decay=0.0)},
            "optimizer.layer_decay: expected more than 0 and at most 1, got 0",
        ),
        (
            {"optimizer": OptimizerConfig(ema_decay=1.0)},
            "optimizer.ema_decay: expected more than 0 and less than 1, got 1",
        ),
    ],
)
def test_check_of_what_is_trained(change, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(TrainingConfig(), **change), ranks=1)


def test_weights_from_two_files():
    config = TrainingConfig(model=ModelConfig(pretrained="x.pt"), run=RunConfig(continue_from=Path("y.pt")))
    with pytest.raises(ConfigError, match=r"run.continue_from: .* expected no model.pretrained with it, got x.pt"):
        check(config, ranks=1)


def test_check_schedules():
    with pytest.raises(ConfigError, match=r"optimizer.pool.warmup: expected 0 to 4, .* of 5 updates, got 5"):
        check_schedules(OptimizerConfig(GroupConfig(1, 1), GroupConfig(1, 1, warmup=5)), 5)


@pytest.mark.parametrize(
    ("setting", "fixed"),
    [
        ("data.kind", True), ("data.root", False), ("run.steps", False), ("loss.weights.weight", False),
        ("data.mixture.a.kind", True), ("data.mixture.a.weight", True), ("data.mixture.a.shuffle", True),
        ("data.mixture.a.root", False), ("data.mixture.kind", True), ("lora.alpha", True), ("lora.dropout", False),
        ("optimizer.ema_decay", False), ("lock.text_unlocked_layers", True),
    ],
)  # fmt: skip
def test_what_a_resumed_run_must_have(setting, fixed):
    assert is_fixed(setting) is fixed


@pytest.mark.parametrize(("steps", "warmup"), [(9, 0), (30, 3), (300, 30), (500, 50), (10_000, 50)])
def test_warm_up_fits_the_run(steps, warmup):
    """By default, a tenth of the run, at most 50; a number that is given is taken."""
    check_schedules(OptimizerConfig(), steps)
    assert GroupConfig(1, 1).warmup_steps(steps) == warmup
    assert GroupConfig(1, 1, warmup=7).warmup_steps(steps) == 7


def test_backend(monkeypatch):
    cpu = torch.device("cpu")
    for form in ("ce", "bce"):
        for backend in ("auto", "blockwise", "reference"):
            check_backend(LossConfig(form, backend=backend), cpu)
        with pytest.raises(ConfigError, match=r"loss.backend: expected one of .*, got 'folded'; the nearest is"):
            check_backend(LossConfig(form, backend="folded"), cpu)
    with pytest.raises(ConfigError, match=r"^loss.backend: similarity_softplus: no backend can serve .* cuda: [^\n]*$"):
        check_backend(LossConfig("bce", backend="cuda"), cpu)
    monkeypatch.setenv("BETACLIP_BACKEND", "nonsense")
    with pytest.raises(ConfigError, match=r"loss.backend: BETACLIP_BACKEND: expected one of .*, got 'nonsense'"):
        check_backend(LossConfig(), cpu)


def test_workers_are_left_out_where_the_model_needs_the_cores():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [RunConfig(workers=workers).workers_with(device) for workers in (None, 3) for device in (cpu, gpu)] == [
        0, 1, 3, 3,
    ]  # fmt: skip

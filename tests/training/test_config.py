from dataclasses import fields, is_dataclass, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from support.paths import ROOT

from betaclip.errors import ConfigError
from betaclip.settings import read, to_toml
from betaclip.training.config import EvaluationConfig, GroupConfig, OptimizerConfig, TrainConfig, check, check_schedules

CONFIGS = ROOT / "configs"


def test_scenes_are_the_defaults():
    assert read(TrainConfig(), CONFIGS / "scenes.toml") == TrainConfig()


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_published_recipes(form, tmp_path):
    config = read(TrainConfig(), CONFIGS / f"vit_b16_sharegpt4v_{form}.toml")
    assert (config.model.name, config.model.pretrained, config.model.context_length) == ("ViT-B-16", "openai", 248)
    assert (config.model.pool_heads, config.model.pool_norm_inputs, config.model.pool_identity) == (8, False, False)
    assert (config.loss.form, config.loss.beta, config.loss.alpha) == (form, 0.5, 1.0)
    assert config.data.kind == "sharegpt4v" and (config.data.sentences, config.data.max_phrases) == (5, 30)
    assert config.optimizer == OptimizerConfig(
        backbone=GroupConfig(1e-5, 1e-7, initial_lr=1e-9, warmup=6), pool=GroupConfig(1e-3, 1e-4)
    )
    assert (config.run.batch_size, config.run.micro_batch_size, config.run.epochs) == (2048, 64, 10)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read(TrainConfig(), tmp_path / "config.toml") == config


def optional_defaults(cls: Any) -> list[tuple[str, object]]:
    """Names and defaults of all fields that may be None."""
    hints, found = get_type_hints(cls), []
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            found += optional_defaults(hints[f.name])
        elif NoneType in get_args(hints[f.name]):
            found.append((f.name, f.default))
    return found


def test_what_may_be_none_is_none_by_default():
    """TOML cannot say None: a saved run would otherwise come back with something else."""
    found = optional_defaults(TrainConfig)
    assert len(found) > 10 and {default for _, default in found} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "run.batch_size: expected at least 4, one for each rank, got 3"),
        ({"micro_batch_size": 0}, "run.micro_batch_size: expected at least 1, got 0"),
        ({"steps": -1}, "run.steps: expected at least 1, got -1"),
        ({"workers": -1}, "run.workers: expected at least 0, got -1"),
        ({"resume": True}, "run.resume: which run"),
        ({"parallel": "fsdp", "precision": "fp16"}, "run.precision: fp16"),
    ],
)
def test_check(change, message):
    config = TrainConfig()
    check(config, ranks=4)
    with pytest.raises(ConfigError, match=message):
        check(replace(config, run=replace(config.run, **change)), ranks=4)


def test_check_others():
    with pytest.raises(ConfigError, match=r"evaluation.every: expected at least 1, got 0"):
        check(replace(TrainConfig(), evaluation=EvaluationConfig(every=0)), ranks=1)
    with pytest.raises(ConfigError, match=r"optimizer.pool.warmup: expected less than the run's 5 updates, got 5"):
        check_schedules(OptimizerConfig(GroupConfig(1, 1), GroupConfig(1, 1, warmup=5)), 5)

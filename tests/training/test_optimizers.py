import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.paths import GOLDEN
from torch import nn

from betaclip.training.config import GroupConfig, OptimizerConfig
from betaclip.training.optimizers import clip_gradients, create_optimizer, learning_rate, set_learning_rates


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.class_embedding = nn.Parameter(torch.randn(4))
        self.positional_embedding = nn.Parameter(torch.randn(5, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.pool = nn.MultiheadAttention(4, 2)
        self.pool.logit_scale = nn.Parameter(torch.tensor(2.0))


CONFIG = OptimizerConfig(
    backbone=GroupConfig(1e-3, 1e-5, initial_lr=1e-9, warmup=4),
    pool=GroupConfig(1e-2, 1e-4, warmup=0),
    weight_decay=0.3,
)


def test_groups():
    model = Model()
    optimizer = create_optimizer(model, CONFIG)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: (g["part"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "tower.0.weight": ("backbone", 0.3),
        "tower.0.bias": ("backbone", 0.0),
        "tower.1.weight": ("backbone", 0.0),
        "tower.1.bias": ("backbone", 0.0),
        "class_embedding": ("backbone", 0.3),
        "positional_embedding": ("backbone", 0.3),
        "logit_scale": ("backbone", 0.0),
        "pool.in_proj_weight": ("pool", 0.3),
        "pool.in_proj_bias": ("pool", 0.0),
        "pool.out_proj.weight": ("pool", 0.3),
        "pool.out_proj.bias": ("pool", 0.0),
        "pool.logit_scale": ("pool", 0.0),
    }


def test_learning_rates():
    backbone = [learning_rate(step, 11, CONFIG.backbone) for step in range(11)]
    assert backbone[:5] == pytest.approx([1e-9, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3], rel=1e-5)
    assert backbone[4] == 1e-3 and backbone[10] == 1e-5
    assert backbone[7] == pytest.approx((1e-3 + 1e-5) / 2)
    assert backbone[5] == pytest.approx(1e-5 + 0.99e-3 * (1 + math.cos(math.pi / 6)) / 2)
    pool = [learning_rate(step, 11, CONFIG.pool) for step in range(11)]
    assert pool[0] == 1e-2 and pool[10] == 1e-4 and pool == sorted(pool, reverse=True)
    assert learning_rate(0, 1, CONFIG.pool) == 1e-2
    optimizer = create_optimizer(Model(), CONFIG)
    set_learning_rates(optimizer, 7, 11, CONFIG)
    assert {g["part"]: g["lr"] for g in optimizer.param_groups} == {"backbone": backbone[7], "pool": pool[7]}


@pytest.mark.parametrize(
    ("part", "config"),
    [("backbone", GroupConfig(1e-3, 1e-5, initial_lr=1e-6, warmup=3)), ("pool", GroupConfig(1e-3, 1e-4))],
)
def test_published_schedule(part, config):
    """The released code's rates, of which the third and the fourth are the highest."""
    rates = [learning_rate(step, 8, config, "published") for step in range(8)]
    assert rates == pytest.approx(
        load_file(GOLDEN / "published_training.safetensors")[f"lr.{part}"].tolist(), rel=1e-12
    )


def test_published_schedule_of_one_update_of_warmup():
    config = replace(CONFIG, schedule="published", backbone=replace(CONFIG.backbone, warmup=1))
    optimizer = create_optimizer(Model(), config)
    for step, rate in ((0, 1e-9), (1, 1e-3)):
        set_learning_rates(optimizer, step, 5, config)
        assert {g["lr"] for g in optimizer.param_groups if g["part"] == "backbone"} == {rate}


def test_clips_each_part_by_its_own_norm():
    model = Model()
    config = replace(CONFIG, backbone=replace(CONFIG.backbone, clip_norm=0.5))
    optimizer = create_optimizer(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norms = clip_gradients(optimizer, config)
    for part in ("backbone", "pool"):
        of_part = {name: g for name, g in before.items() if name.startswith("pool") is (part == "pool")}
        norm = torch.stack([g.norm() for g in of_part.values()]).norm()
        torch.testing.assert_close(norms[part], norm)
        factor = 0.5 / (norm + 1e-6) if part == "backbone" else 1.0
        for name, gradient in of_part.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient * factor)

"""What is frozen stays as it is, and what is not is trained as if there were nothing frozen."""

from dataclasses import replace

import pytest
import torch
from open_clip.model import CustomTextCLIP
from support.steps import assert_same, config, create_step, double, parameters
from support.tiny import tiny_batch, tiny_model
from support.towers import clip_model
from torch import nn

from betaclip.errors import ConfigError
from betaclip.model.beta_clip import BetaCLIP, ModelConfig
from betaclip.model.text_tower import stretch_positions
from betaclip.training.config import LockConfig
from betaclip.training.freezing import lock_towers


def trained(model: nn.Module, tower: str) -> set[str]:
    """The parts of a tower with parameters in training: its modules and parameters, blocks by number."""
    names = (name.removeprefix(f"clip.{tower}") for name, p in model.named_parameters() if p.requires_grad
             and name.startswith(f"clip.{tower}"))  # fmt: skip
    return {name.removeprefix("transformer.resblocks.").split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("unlocked", "expected"),
    [
        (0, set()),
        (1, {"proj"}),
        (2, {"proj", "ln_post", "1"}),
        (3, {"proj", "ln_post", "1", "0"}),
        (4, {"proj", "ln_post", "1", "0", "conv1", "class_embedding", "positional_embedding", "ln_pre"}),
    ],
)
def test_groups_of_the_image_tower(unlocked, expected):
    model = tiny_model()
    others = {name for name, p in model.named_parameters() if p.requires_grad and ".visual." not in name}
    lock_towers(model, LockConfig(image=True, image_unlocked_groups=unlocked))
    assert trained(model, "visual.") == expected
    assert all(model.get_parameter(name).requires_grad for name in others)


@pytest.mark.parametrize(
    ("unlocked", "expected"),
    [
        (0, set()),
        (2, {"text_projection", "ln_final", "2"}),
        (5, {"text_projection", "ln_final", "2", "1", "0", "token_embedding", "parametrizations"}),
    ],
)
def test_groups_of_the_text_tower(unlocked, expected):
    """Stretched positions are embeddings too."""
    clip = clip_model(CustomTextCLIP)
    stretch_positions(clip)
    model = BetaCLIP(clip, ModelConfig(pool_heads=2))
    lock_towers(model, LockConfig(text=True, text_unlocked_layers=unlocked))
    assert trained(model, "text.") == expected
    assert all(p.requires_grad for p in model.clip.visual.parameters()) and model.logit_scale.requires_grad


def test_layer_norms():
    model = tiny_model()
    lock_towers(model, LockConfig(text=True, text_freeze_layer_norm=False, image=True, image_freeze_layer_norm=False))
    names = {name for name, p in model.clip.named_parameters() if p.requires_grad and name != "logit_scale"}
    assert {name for name in names if ".ln_" not in f".{name}"} == set() and len(names) == 2 * (2 * 4 + 2) + 2
    lock_towers(model, LockConfig(text=True))
    assert trained(model, "ln_final") == set() and model.clip.visual.ln_pre.weight.requires_grad


LOCKED = LockConfig(image=True, text=True, text_unlocked_layers=2)


@pytest.mark.parametrize("size", [None, 2], ids=["whole", "cached"])
def test_step(size):
    """The same gradients as without a lock where there is none, no change at all where there is."""
    batch, model, free = double(tiny_batch(5)), tiny_model().double(), tiny_model().double()
    settings = config(micro_batch_size=size)
    before = parameters(model)
    train_step = create_step(model, replace(settings, lock=LOCKED))
    others = create_step(free, config())
    kept = {}
    for one, name in ((train_step, "locked"), (others, "free")):
        zero_grad = one.optimizer.zero_grad

        def keep(name: str = name, one=one, zero_grad=zero_grad) -> None:
            kept[name] = {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}
            zero_grad()

        one.optimizer.zero_grad = keep
        one.optimizer.param_groups[0]["lr"] = 0.0
    row = dict(zip(train_step.columns, train_step(batch, 0, 5), strict=True))
    others(batch, 0, 5)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert kept["locked"].keys() == names and any(name.startswith("clip.transformer.resblocks.1") for name in names)
    pool = {name: g for name, g in kept["locked"].items() if name.startswith("pool.")}
    assert_same(pool, {name: kept["free"][name] for name in pool}, 1e-12)
    after = parameters(model)
    assert all(torch.equal(after[name], before[name]) is (name not in names) for name in after)
    assert {id(p) for p in train_step.optimizer.state} == {id(model.get_parameter(name)) for name in names}
    # Clipping scales by the norm of what is trained alone.
    clipped = torch.stack([g.norm() for name, g in kept["locked"].items() if name not in pool]).norm()
    assert row["norm_backbone"] > 0.5 and clipped.item() == pytest.approx(0.5, rel=1e-5)


def test_whole_backbone_is_frozen():
    """Then its norm and rate are not logged; the pool is trained in micro-batches, too."""
    model = tiny_model()
    model.logit_scale.requires_grad_(False)
    settings = config(micro_batch_size=2)
    loss = replace(settings.loss, global_weight=0.0)
    train_step = create_step(model, replace(settings, loss=loss, lock=LockConfig(image=True, text=True)))
    assert "norm_pool" in train_step.columns and "norm_backbone" not in train_step.columns
    before = parameters(model)
    assert train_step(tiny_batch(5), 0, 5).isfinite().all()
    after = parameters(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith("pool.")
    }


def test_inverse_temperature_alone():
    """With both towers frozen, the global loss trains nothing else, whatever the micro-batches."""
    values = []
    for size in (None, 2):
        model = tiny_model().double()
        settings = replace(config(micro_batch_size=size), lock=LockConfig(image=True, text=True))
        train_step = create_step(model, replace(settings, loss=replace(settings.loss, beta_cal_weight=0.0)))
        train_step(double(tiny_batch(5)), 0, 5)
        values.append(model.logit_scale.item())
    assert values[0] == pytest.approx(values[1], abs=1e-12) and values[0] != tiny_model().logit_scale.item()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LockConfig(image=True, image_unlocked_groups=5), "lock.image_unlocked_groups: expected 0 to 4, .*got 5"),
        (LockConfig(text=True, text_unlocked_layers=-1), "lock.text_unlocked_layers: expected 0 to 4, .*got -1"),
    ],
)
def test_rejects(config, message):
    with pytest.raises(ConfigError, match=message):
        lock_towers(tiny_model(), config)

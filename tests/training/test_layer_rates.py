import pytest
from open_clip.model import CustomTextCLIP
from support.steps import OPTIMIZER
from support.tiny import tiny_model
from support.towers import clip_model

from betaclip.model.beta_clip import BetaCLIP, ModelConfig
from betaclip.model.text_tower import stretch_positions
from betaclip.training.config import OptimizerConfig
from betaclip.training.layer_rates import layers, summary
from betaclip.training.optimizers import create_optimizer, highest_rates, set_learning_rates


def test_layers():
    """Two blocks in each tower: embeddings 0, blocks 1 and 2, head 3."""
    numbers = {
        "clip.visual.conv1.weight": ("image", 0),
        "clip.visual.class_embedding": ("image", 0),
        "clip.visual.positional_embedding": ("image", 0),
        "clip.visual.ln_pre.weight": ("image", 0),
        "clip.visual.transformer.resblocks.0.mlp.c_fc.weight": ("image", 1),
        "clip.visual.transformer.resblocks.1.attn.in_proj_weight": ("image", 2),
        "clip.visual.ln_post.bias": ("image", 3),
        "clip.visual.proj": ("image", 3),
        "clip.token_embedding.weight": ("text", 0),
        "clip.positional_embedding": ("text", 0),
        "clip.transformer.resblocks.1.ln_2.bias": ("text", 2),
        "clip.ln_final.weight": ("text", 3),
        "clip.text_projection": ("text", 3),
    }
    found = layers(name for name, _ in tiny_model().named_parameters())
    assert {name: (found[name].tower, found[name].number) for name in numbers} == numbers
    assert {layer.depth for layer in found.values()} == {2}
    assert not {"clip.logit_scale", "pool.logit_scale", "pool.mlp.c_fc.weight"} & found.keys()


def test_text_tower_of_its_own_with_stretched_positions():
    clip = clip_model(CustomTextCLIP)
    stretch_positions(clip)
    model = BetaCLIP(clip, ModelConfig(pool_heads=2))
    found = layers(name for name, _ in model.named_parameters())
    assert found["clip.text.parametrizations.positional_embedding.original"][:2] == ("text", 0)
    assert found["clip.text.transformer.resblocks.2.ln_1.weight"] == ("text", 3, 3)
    assert found["clip.text.ln_final.weight"].number == 4 and "clip.logit_scale" not in found


def test_rates_of_the_optimizer():
    """The head has the rate of the schedule, the scales and the pool have their own, whatever the layer."""
    model, config = tiny_model(), OptimizerConfig(OPTIMIZER.backbone, OPTIMIZER.pool, layer_decay=0.5)
    optimizer = create_optimizer(model, config)
    set_learning_rates(optimizer, 3, 10, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    for name, rate in (
        ("clip.visual.proj", 1e-3), ("clip.logit_scale", 1e-3), ("clip.transformer.resblocks.1.ln_1.bias", 5e-4),
        ("clip.visual.transformer.resblocks.0.ln_1.bias", 2.5e-4), ("clip.token_embedding.weight", 1.25e-4),
        ("pool.mlp.c_fc.weight", 3e-3),
    ):  # fmt: skip
        assert rates[name] == pytest.approx(rate, rel=1e-9), name
    assert highest_rates(optimizer) == pytest.approx({"backbone": 1e-3, "pool": 3e-3})
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays["clip.visual.conv1.weight"] == config.weight_decay and decays["clip.visual.ln_pre.weight"] == 0


def test_summary():
    line = summary((name for name, _ in tiny_model().named_parameters()), 0.5)
    assert line.endswith("from embeddings to head: image 0.125 0.25 0.5 1; text 0.125 0.25 0.5 1")

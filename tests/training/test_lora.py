"""Adapters by peft: what they train, what they leave, and what their files hold."""

import builtins
from dataclasses import replace

import pytest
import torch
from support.steps import config, create_step, parameters
from support.tiny import tiny_batch, tiny_model

from betaclip.errors import ConfigError
from betaclip.model.adapters import merge_adapters
from betaclip.training.config import LoraConfig
from betaclip.training.lora import add_adapters

pytest.importorskip("peft", reason="needs peft, of the extra 'test'")


def test_only_adapters_and_the_pool_are_trained():
    model, batch = tiny_model(), tiny_batch(5)
    with torch.no_grad():
        before = model(batch.images, batch.texts)
    train_step = create_step(model, replace(config(micro_batch_size=2), lora=LoraConfig(rank=2)))
    with torch.no_grad():  # they start without effect
        torch.testing.assert_close(model(batch.images, batch.texts)["pooled_embeds"], before["pooled_embeds"])
    weights = parameters(model)
    for step in range(2):
        train_step(batch, step, 5)
    after = parameters(model)
    changed = {name for name in after if not torch.equal(after[name], weights[name])}
    adapters = {name for name in after if ".lora_" in name}
    assert len(adapters) == 2 * 4 * 3  # A and B of three layers of four blocks
    assert changed == adapters | {name for name in after if name.startswith("pool.")}
    assert {id(p) for p in train_step.optimizer.state} == {id(model.get_parameter(name)) for name in changed}


def test_merged_weights_compute_the_same():
    """And are those that peft itself merges."""
    model, batch = tiny_model().double(), tiny_batch(4)
    add_adapters(model, LoraConfig(rank=3, alpha=6.0, targets=("out_proj", "c_proj")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
        truth = model(batch.images.double(), batch.texts)
        plain = tiny_model().double()
        plain.load_state_dict(merge_adapters(model.state_dict(), alpha=6.0))
        out = plain(batch.images.double(), batch.texts)
        for name in truth:
            torch.testing.assert_close(out[name], truth[name])
        layer = model.clip.visual.transformer.resblocks[0].attn.out_proj
        layer.merge()
        merged = plain.clip.visual.transformer.resblocks[0].attn.out_proj
        torch.testing.assert_close(layer.base_layer.weight, merged.weight)
        assert (merged.weight - tiny_model().clip.visual.transformer.resblocks[0].attn.out_proj.weight).abs().max() > 1


@pytest.mark.parametrize(
    ("target", "got"),
    [
        ("attn", "'attn', which is a MultiheadAttention"),
        ("mlp", "'mlp', which is a Sequential"),
        ("conv1", "'conv1', which is a Conv2d"),
        ("q_proj", "'q_proj'"),
        ("", "''"),
    ],
)
def test_targets_that_would_not_act_are_refused(target, got):
    """The towers read the weights of attn, so that an adapter of it would do nothing."""
    message = "^lora.targets: expected names of linear layers of the towers, such as out_proj, c_fc and c_proj, got "
    with pytest.raises(ConfigError, match=f"{message}{got}$"):
        add_adapters(tiny_model(), LoraConfig(rank=2, targets=("c_fc", target)))


def test_peft_is_missing(monkeypatch):
    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return imports(name, *args, **kwargs)

    imports = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ConfigError, match=r"^lora.rank: peft is not installed: pip install peft$"):
        add_adapters(tiny_model(), LoraConfig(rank=2))

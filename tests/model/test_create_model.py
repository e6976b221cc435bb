"""create_model makes models from names, settings and files of weights."""

import json
import logging

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from support.towers import TINY, clip_model
from torch import nn

from betaclip.layers import QuickGELU
from betaclip.model import ModelConfig, create_model


def test_default_learns_scenes():
    beta_clip = create_model(ModelConfig())
    assert (beta_clip.image_size, beta_clip.patch_grid, beta_clip.embed_dim) == (72, (6, 6), 128)
    assert beta_clip.clip.vocab_size == 49408  # open_clip's tokenizer's
    assert sum(p.numel() for p in beta_clip.parameters()) < 10e6


def test_names(monkeypatch):
    """open_clip is asked for QuickGELU with the weights that were trained with it, whatever the name says."""
    asked = []

    def create(name: str, pretrained: str | None, force_quick_gelu: bool) -> nn.Module:
        asked.append((name, pretrained, force_quick_gelu))
        return clip_model(quick_gelu=force_quick_gelu)

    monkeypatch.setattr(open_clip, "create_model", create)
    cases = [("ViT-B/16", "openai"), ("ViT-L-14", "openai"), ("ViT-B-16", "laion2b_s34b_b88k"), ("ViT-H-14", None)]
    models = [create_model(ModelConfig(name=name, pretrained=tag, pool_heads=4)) for name, tag in cases]
    assert asked == [
        ("ViT-B-16", "openai", True),
        ("ViT-L-14", "openai", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-H-14", None, False),
    ]
    for beta_clip, (*_, quick) in zip(models, asked, strict=True):
        assert beta_clip.config.quick_gelu is quick
        assert (type(beta_clip.clip.visual.transformer.resblocks[0].mlp.gelu) is QuickGELU) is quick


def test_checkpoint_of_a_model_with_openais_weights():
    """The configuration makes the same towers again without ``pretrained``."""
    beta_clip = create_model(ModelConfig(name=TINY, pool_heads=4, quick_gelu=True))
    assert all(isinstance(block.mlp.gelu, QuickGELU) for block in beta_clip.clip.transformer.resblocks)
    assert beta_clip.config.quick_gelu


def test_no_alarm_of_random_weights(monkeypatch, caplog):
    """open_clip's would also come where the weights of a file are loaded next; its other warnings stay."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", json.loads(TINY))
    create = open_clip.create_model

    def create_and_warn(*args: object, **options: object) -> nn.Module:
        logging.warning("another one")
        return create(*args, **options)

    monkeypatch.setattr(open_clip, "create_model", create_and_warn)
    create_model(ModelConfig(name="tiny", pool_heads=4))
    assert [record.getMessage() for record in caplog.records] == ["another one"]
    logging.warning("initialized randomly")
    assert len(caplog.records) == 2


@pytest.mark.parametrize("stretch", [False, True])
def test_open_clips_files(tmp_path, stretch):
    clip = clip_model(vision={"layers": 2}, text={"layers": 2})
    torch.save({"state_dict": {f"module.{name}": t for name, t in clip.state_dict().items()}}, tmp_path / "x.pt")
    config = ModelConfig(
        name=TINY, pretrained=str(tmp_path / "x.pt"), pool_heads=4, context_length=248 if stretch else 77
    )
    beta_clip = create_model(config)
    assert torch.equal(beta_clip.clip.visual.proj, clip.visual.proj)
    positions = beta_clip.clip.positional_embedding
    assert torch.equal(positions[20::4] if stretch else positions[20:], clip.positional_embedding[20:])


@pytest.mark.parametrize("wrappers", ["_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "visual."])
def test_open_clips_files_of_wrapped_models(tmp_path, wrappers):
    clip = clip_model(vision={"layers": 2}, text={"layers": 2})
    if wrappers == "visual.":  # compiled by itself
        state = {name.replace("visual.", "visual._orig_mod."): t for name, t in clip.state_dict().items()}
    else:
        state = {wrappers + name: t for name, t in clip.state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    beta_clip = create_model(ModelConfig(name=TINY, pretrained=str(tmp_path / "x.pt"), pool_heads=4))
    for name, value in clip.state_dict().items():
        assert torch.equal(beta_clip.clip.state_dict()[name], value), name


def test_files_of_openais_tensors(tmp_path):
    """The tensors of OpenAI's archives are half precision and come with three sizes; QuickGELU follows from them."""
    clip = clip_model(quick_gelu=True, vision={"layers": 2}, text={"layers": 2})
    sizes = {name: torch.tensor(24) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({name: t.half() for name, t in clip.state_dict().items()} | sizes, tmp_path / "x.pt")
    beta_clip = create_model(ModelConfig(name=TINY, pretrained=str(tmp_path / "x.pt"), pool_heads=4))
    assert beta_clip.config.quick_gelu
    assert isinstance(beta_clip.clip.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    for name, value in clip.state_dict().items():
        assert torch.equal(beta_clip.clip.state_dict()[name], value.half().float()), name


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clips_files_of_other_sizes(tmp_path, custom_text):
    """Positions are interpolated as open_clip does, from files with either kind of names."""
    towers = {"vision": {"layers": 2, "image_size": 32}, "text": {"layers": 2, "context_length": 50}}
    torch.save(clip_model(**towers).state_dict(), tmp_path / "x.pt")
    name = json.dumps(json.loads(TINY) | {"custom_text": custom_text})
    beta_clip = create_model(ModelConfig(name=name, pretrained=str(tmp_path / "x.pt"), pool_heads=4))
    other = clip_model(open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP,
                       vision={"layers": 2}, text={"layers": 2})  # fmt: skip
    open_clip.load_checkpoint(other, str(tmp_path / "x.pt"))
    for name, value in other.state_dict().items():
        assert torch.equal(beta_clip.clip.state_dict()[name], value), name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {n: t for n, t in s.items() if n != "visual.proj"}, "it lacks visual.proj$"),
        (lambda s: s | {"head.weight": torch.ones(2), "head.bias": torch.ones(2)}, "also has head.weight and 1 more$"),
        (lambda s: s | {"visual.proj": torch.ones(48, 12)}, r"visual.proj: expected shape \(40, 12\), got \(48, 12\)$"),
        (
            lambda s: s | {"visual.positional_embedding": torch.ones(12, 40)},
            r"visual.positional_embedding: expected shape \(10, 40\), got \(12, 40\)$",
        ),
        (
            lambda s: s | {"positional_embedding": torch.tensor(1.0)},
            r"positional_embedding: expected shape \(77, 24\), got \(\)$",
        ),
        (
            lambda s: {"vision_model.x": torch.ones(2), "text_model.x": torch.ones(2)},
            "it lacks positional_embedding and .* more, and it also has vision_model.x and 1 more. "
            "The names are those of transformers; open_clip's are expected$",
        ),
    ],
    ids=["missing", "extra", "width", "grid", "0-d", "transformers"],
)
def test_files_of_other_models(tmp_path, change, message):
    state = clip_model(vision={"layers": 2}, text={"layers": 2}).state_dict()
    torch.save(change(state), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"^pretrained: .*x\.pt does not fit model.name .*: .*{message}"):
        create_model(ModelConfig(name=TINY, pretrained=str(tmp_path / "x.pt"), pool_heads=4))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_our_files(tmp_path, suffix):
    beta_clip = create_model(ModelConfig(name=TINY, pool_heads=4, context_length=248))
    path = tmp_path / f"x.{suffix}"
    if suffix == "pt":
        torch.save({"betaclip": 1, "model": beta_clip.state_dict()}, path)
    else:
        save_file(beta_clip.state_dict(), path)
    again = create_model(ModelConfig(name=TINY, pretrained=str(path), pool_heads=4, context_length=248))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in beta_clip.state_dict().items())


@pytest.mark.parametrize(
    "config, error, message",
    [
        (
            ModelConfig(name="ViT-B-17"),
            ValueError,
            "name: expected scenes, a configuration in JSON, .*, got 'ViT-B-17'; the nearest is 'ViT-B-16'",
        ),
        (ModelConfig(name="{no"), ValueError, "name: expected JSON after an opening brace"),
        (ModelConfig(name="ViT-B-16", pretrained="opnai"), ValueError, "pretrained: expected a file, or one of openai"),
        (
            ModelConfig(pretrained="openai"),
            ValueError,
            "pretrained: openai is not a file, and scenes has no pretrained tags",
        ),
        (ModelConfig(context_length=100), ValueError, "context_length: expected 77, or 248 .*, got 100"),
        (ModelConfig(name=TINY, pool_heads=5), ValueError, "num_heads: expected a divisor of embed_dim = 12, got 5"),
    ],
)
def test_create_model_rejects(config, error, message):
    with pytest.raises(error, match=message):
        create_model(config)


def test_towers_that_cannot_serve():
    """The message lists all reasons."""
    options = json.loads(TINY)
    options["vision_cfg"] |= {"pool_type": "avg", "patch_dropout": 0.5}
    options["text_cfg"] |= {"no_causal_mask": True}
    with pytest.raises(NotImplementedError) as raised:
        create_model(ModelConfig(name=json.dumps(options)))
    for reason in ("pool_type is 'avg'", "patch_dropout", "no_causal_mask"):
        assert reason in str(raised.value)
    options["text_cfg"]["nothing"] = 1
    with pytest.raises(ValueError, match=r"name: .*nothing"):
        create_model(ModelConfig(name=json.dumps(options)))

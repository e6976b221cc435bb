"""``betaclip export``: what it writes, other libraries load as the same model, and what it refuses is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.tiny import TOKENIZER_MODEL
from torch import nn
from transformers import CLIPModel, CLIPProcessor

import betaclip
from betaclip import checkpoint
from betaclip.cli import main
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.published import load_published
from betaclip.settings import to_dict

TEXTS = ["A red mug, isn't it?", "a dog " * 150, "", "Ünïcode 東京 123"]  # the second one is too long


def towers(vision: dict[str, Any], text: dict[str, Any], **options: Any) -> str:
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8} | vision
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2} | text
    return json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **options})


WORDS = towers({}, {"vocab_size": 50})
PUBLISHED = ModelConfig(name=WORDS, context_length=248, pool_heads=3, quick_gelu=True)
# Widths of heads, activations, lengths of contexts and classes of open_clip all differ.
PLAIN = {
    "scenes": ModelConfig("scenes", pool_heads=4, pool_norm_inputs=True),
    "stretched": ModelConfig(
        towers({"head_width": 16, "mlp_ratio": 3.0}, {"heads": 4, "layers": 1}), context_length=248, quick_gelu=True
    ),
    "custom text": ModelConfig(towers({"patch_size": 4, "width": 32}, {"context_length": 21}, custom_text=True),
                               context_length=24),
    "tanh": ModelConfig(towers({"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}, {},
                               nonscalar_logit_scale=True)),
}  # fmt: skip
OTHERS = {
    "bias": ModelConfig(towers({}, {}, init_logit_bias=-10.0, nonscalar_logit_scale=True)),
    "layer scale": ModelConfig(towers({"ls_init_value": 0.1}, {}, custom_text=True), context_length=248),
    "no norm": ModelConfig(towers({"no_ln_pre": True}, {"proj_bias": True})),
}


def saved(path: Path, config: ModelConfig) -> BetaCLIP:
    torch.manual_seed(0)
    model = create_model(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "logit" not in name:
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    content = {"betaclip": checkpoint.FORMAT, "step": 0, "config": {"model": to_dict(model.config)}}
    checkpoint.write(path, content | {"model": model.state_dict()}, keep=1)
    return model


def run(folder: Path, config: ModelConfig) -> betaclip.Model:
    return betaclip.Model(saved(checkpoint.checkpoint_path(folder, 0), config))


def picture() -> Image.Image:
    """Its sides are 2 to 3, so that the central square lies on whole pixels in all sizes here."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8))


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, to: str = "published", code: int = 2) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["export", *map(str, arguments), "--to", to])
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("betaclip export: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_open_clip(tmp_path, capsys, name):
    """A user of open_clip gets the embeddings of pictures and texts with what open_clip finds in the folder."""
    ours = run(tmp_path, (PLAIN | OTHERS)[name])
    main(["export", str(tmp_path), "--to", "open_clip"])
    folder = tmp_path / "open_clip"
    assert capsys.readouterr().out.startswith(f"{folder}: written; open_clip.create_model_and_transforms")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        image = F.normalize(model.eval().encode_image(preprocess(picture())[None]), dim=-1)
        texts = F.normalize(model.encode_text(tokenizer(TEXTS)), dim=-1)
    torch.testing.assert_close(image, ours.encode_image(picture()), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, ours.encode_text(TEXTS), atol=1e-5, rtol=0)
    assert model.logit_scale.exp().item() == ours.model.logit_scale.exp().item()
    assert (model.logit_bias is None) == (ours.model.logit_bias is None)


@pytest.mark.parametrize("name", PLAIN)
def test_transformers(tmp_path, name):
    ours = run(tmp_path, PLAIN[name])
    main(["export", str(tmp_path), str(folder := tmp_path / "new" / "folder"), "--to", "transformers"])
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=TEXTS, images=picture(), return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        out = model(**inputs)
        exact = model(**dict(inputs) | {"pixel_values": ours.transform(picture())[None]})
    torch.testing.assert_close(out.text_embeds, ours.encode_text(TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(exact.image_embeds, ours.encode_image(picture()), atol=1e-5, rtol=0)
    logits = ours.model.logit_scale.exp() * ours.similarity(picture(), TEXTS)
    torch.testing.assert_close(exact.logits_per_image, logits, atol=1e-4, rtol=0)
    # transformers resizes by another program, so pixels differ by one of 256 levels.
    difference = (inputs["pixel_values"] - ours.transform(picture())).abs().max()
    assert difference < 1.1 / 255 / 0.26


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
@pytest.mark.parametrize("name", ["stretched", "custom text"])
def test_pooling_goes_along(tmp_path, to, name):
    """betaclip reads the whole model from the folder, and exports it again."""
    ours = run(tmp_path, PLAIN[name])
    main(["export", str(tmp_path), "--to", to])
    main(["export", str(tmp_path / to), str(tmp_path / "again"), "--to", "open_clip"])
    for folder in (to, "again"):
        again = betaclip.load(tmp_path / folder)
        state = again.model.state_dict()
        assert state.keys() == ours.model.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())
        scores = again.conditioned_similarity(picture(), TEXTS)
        assert torch.equal(scores, ours.conditioned_similarity(picture(), TEXTS))


@pytest.mark.parametrize("folder", [True, False], ids=["run", "checkpoint"])
def test_published(tmp_path, capsys, folder):
    file, out = checkpoint.checkpoint_path(tmp_path, 0), tmp_path / "new" / "model.safetensors"
    model = saved(file, PUBLISHED)
    main(["export", str(tmp_path if folder else file), str(out), "--to", "published"])
    said = f"{out}: written; it says that its towers' heads are of width 8 and that its pool has 3\n"
    assert capsys.readouterr().out == said
    again = load_published(out).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_published_with_other_heads_in_each_tower(tmp_path, capsys):
    config = ModelConfig(towers({"head_width": 4}, {"heads": 1}), context_length=248, quick_gelu=True, pool_heads=2)
    ours = run(tmp_path, config)
    main(["export", str(tmp_path), "--to", "published"])
    assert "of width 4 (vision) and 16 (text) and that its pool has 2" in capsys.readouterr().out
    again = betaclip.load(tmp_path / "published.safetensors")
    assert torch.equal(again.conditioned_similarity(picture(), TEXTS), ours.conditioned_similarity(picture(), TEXTS))
    main(["export", str(tmp_path / "published.safetensors"), "--to", "open_clip"])
    again = betaclip.load(tmp_path / "published_open_clip")
    assert torch.equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))
    message = fails(capsys, tmp_path / "published.safetensors", "--head-width", 8, to="open_clip")
    assert "published.safetensors: vision_head_width: the file says 4, and 8 is asked for" in message


@pytest.mark.parametrize(
    "name, reason",
    [
        ("bias", "a bias of the logits (init_logit_bias)"),
        ("layer scale", "LayerScale"),
        ("no norm", "its vision tower has no LayerNorm before the blocks; its text projection is not a plain matrix"),
        ("words", "its vocabulary has 50 tokens, where that of CLIP's tokenizer has 49408"),
    ],
)
def test_does_not_fit(tmp_path, capsys, name, reason):
    run(tmp_path, (OTHERS | {"words": ModelConfig(WORDS)})[name])
    message = fails(capsys, tmp_path, to="transformers")
    assert f"{tmp_path}: transformers' CLIPModel cannot hold this model: it" in message and reason in message
    assert message.endswith("; --to open_clip can\n")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00000000.pt"]


def test_refused(tmp_path, capsys):
    file, out = checkpoint.checkpoint_path(tmp_path, 0), tmp_path / "model.safetensors"
    saved(file, ModelConfig(name=TOKENIZER_MODEL))
    message = fails(capsys, file, out)
    assert "expected context_length 248, got 77" in message and "not QuickGELU" in message and str(file) in message
    assert f"{tmp_path / 'no'}: no such file" in fails(capsys, tmp_path / "no", out)
    message = fails(capsys, file, tmp_path / "model.pt")
    assert f"output: expected a name that ends in .safetensors, got {tmp_path / 'model.pt'}" in message
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for to in ("open_clip", "transformers"):
        for taken in (tmp_path / "full", file):
            assert f"output: {taken}: exists already" in fails(capsys, file, taken, to=to)
        assert "cannot be written" in fails(capsys, file, file / "folder", to=to, code=1)
    assert (tmp_path / "full" / "mine").read_text() == "kept"
    saved(file, PUBLISHED)
    assert "cannot be written" in fails(capsys, file, file / "model.safetensors", code=1)

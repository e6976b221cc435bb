"""A model in Python, beside the towers and the pool called by hand, and where the right answers are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from support import colours
from support.paths import ROOT
from support.tiny import TOKENIZER_MODEL

import betaclip
from betaclip.inference import attention
from betaclip.model import ModelConfig, create_model
from betaclip.model.texts import RaggedTexts
from betaclip.model.tokenizer import Tokenizer
from betaclip.published import load_published

TEXTS = ["a red square", "green", "blue and red"]
CHECKPOINT = ROOT / "tests" / "golden" / "tiny_published_checkpoint.safetensors"


def coloured() -> betaclip.Model:
    return betaclip.Model(colours.ColourModel(), batch_size=2)


def pictures() -> list[np.ndarray]:
    return [colours.picture({(0, i): name, (3, 3): "green"}) for i, name in enumerate(("red", "blue", "green"))]


def test_known_answers():
    model = coloured()
    best = model.conditioned_similarity(pictures(), ["red", "blue"]).argmax(0)
    assert best.tolist() == [0, 1]
    similar = model.similarity(pictures(), ["red", "blue"])
    assert similar.argmax(0).tolist() == [0, 1] and similar.shape == (3, 2)


def test_equals_the_model(tmp_path):
    """Batches, kinds of pictures and normalisation change nothing."""
    model = betaclip.Model(create_model(ModelConfig(TOKENIZER_MODEL, pool_heads=2)), batch_size=2)
    arrays = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8) for i in range(3)]
    Image.fromarray(arrays[0]).save(path := tmp_path / "picture.png")
    pixels = torch.stack([model.transform(Image.fromarray(a)) for a in arrays])
    with torch.no_grad():
        cls, patches = model.model.encode_image(pixels)
        queries = model.model.encode_text(RaggedTexts.of([[model.tokenizer(t)] for t in TEXTS]))
        pooled = model.model.pool(patches, queries.expand(3, -1, -1))
    for images in (arrays, [path, Image.fromarray(arrays[1]), pixels[2]], [str(path), *arrays[1:]], pixels):
        torch.testing.assert_close(model.encode_image(images), F.normalize(cls, dim=-1))
    torch.testing.assert_close(model.encode_text(TEXTS), F.normalize(queries, dim=-1))
    expected = F.cosine_similarity(cls[:, None], queries, dim=-1)
    torch.testing.assert_close(model.similarity(arrays, TEXTS), expected)
    conditioned = F.cosine_similarity(pooled, queries, dim=-1)
    torch.testing.assert_close(model.conditioned_similarity(arrays, TEXTS), conditioned)
    ranked = model.conditioned_similarity(arrays, TEXTS, top_k=2)
    kept = expected >= expected.topk(2, 0).values[-1]
    assert kept.sum() == 6
    torch.testing.assert_close(ranked, conditioned.masked_fill(~kept, -torch.inf))
    assert not ranked.requires_grad and not model.model.training


def test_one_and_none():
    model = coloured()
    assert model.encode_image(pictures()[0]).shape == (1, 4) and model.encode_text("red").shape == (1, 4)
    assert model.encode_image([]).shape == (0, 4) and model.similarity([], []).shape == (0, 0)
    assert model.conditioned_similarity([], "red").shape == (0, 1)


def test_attention():
    """It lies where the colour is and sums to 1; a text without a colour attends to all patches alike."""
    picture = Image.fromarray(colours.picture({(0, 1): "red", (2, 3): "green"}, 160, 64))
    model = coloured()
    maps = model.attention(picture, ["a red square", "green", "nothing"])
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(3))
    assert maps[0, 0, 1] > 0.99 and maps[1, 2, 3] > 0.99
    torch.testing.assert_close(maps[2], torch.full((4, 4), 1 / 16))
    assert model.attention(picture, "green").shape == (1, 4, 4)


def test_attention_leaves_the_mode():
    model = colours.ColourModel().train()
    attention(model, Tokenizer(), torch.zeros(3, 32, 32), ["red"])
    assert model.training


def test_load(tmp_path):
    published = betaclip.load(CHECKPOINT, head_width=16, pool_heads=4)
    pixels = torch.randn(2, 3, published.model.image_size, published.model.image_size)
    with torch.no_grad():
        cls, _ = load_published(CHECKPOINT, head_width=16).encode_image(pixels)
    torch.testing.assert_close(published.encode_image(pixels), F.normalize(cls, dim=-1))
    assert published.pooled and not published.model.training
    towers = create_model(ModelConfig(TOKENIZER_MODEL))
    save_file({k: v.clone() for k, v in towers.clip.state_dict().items()}, tmp_path / "clip.safetensors")
    plain = betaclip.load(tmp_path / "clip.safetensors", name=TOKENIZER_MODEL)
    torch.testing.assert_close(plain.encode_text(TEXTS), betaclip.Model(towers).encode_text(TEXTS))
    torch.testing.assert_close(plain.encode_image(pictures()), betaclip.Model(towers).encode_image(pictures()))
    assert not plain.pooled
    image = torch.zeros(3, 32, 32)
    for call in (plain.conditioned_similarity, plain.attention):
        with pytest.raises(ValueError, match="the weights have no pooling block: load a checkpoint"):
            call(image, "a")


def test_rejects(tmp_path):
    model = coloured()
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"images: .*torn\.png: UnidentifiedImageError"):
        model.encode_image(tmp_path / "torn.png")
    with pytest.raises(ValueError, match=r"images: .*nowhere\.png: FileNotFoundError"):
        model.encode_image([pictures()[0], str(tmp_path / "nowhere.png")])
    with pytest.raises(ValueError, match=r"images: expected tensors \(3, 32, 32\), got shape \(3, 8, 8\)"):
        model.encode_image(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        model.conditioned_similarity(pictures(), "red", top_k=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        betaclip.Model(colours.ColourModel(), batch_size=0)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        betaclip.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got 'meta'"):
        betaclip.load(CHECKPOINT, device="meta")
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        betaclip.lod  # noqa: B018


def test_paths_may_be_relative(tmp_path, monkeypatch):
    Image.fromarray(pictures()[0]).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(coloured().encode_image("a.png"), coloured().encode_image(Path("a.png")))

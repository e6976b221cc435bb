"""FLAIR's released layout: a synthetic checkpoint in it, against open_clip's and PyTorch's own modules."""

import json
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

import betaclip
from betaclip.checkpoint import load_checkpoint
from betaclip.model import ModelConfig, RaggedTexts, create_model
from betaclip.model.flair_layout import FLAIR_SETTINGS, flair_config, from_flair, is_flair, to_flair
from betaclip.published import load_published, save_published

D, HEADS, END = 16, 2, 59
VISION = {"image_size": 24, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8, "output_tokens": True}
TEXT = {"context_length": 77, "vocab_size": 1 + END, "width": 16, "heads": 2, "layers": 2}
PROJECTIONS = {"visual.proj": "image_post.proj", "text_projection": "text_post.proj"}


class Block(nn.Module):
    """FLAIR's block, by PyTorch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(D) for _ in range(3))
        self.attn = nn.MultiheadAttention(D, HEADS, add_zero_attn=True, batch_first=True)

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        out: Tensor = self.attn(self.ln_q(texts), self.ln_k(patches), self.ln_v(patches))[0]
        return out


class Released:
    """A model in double precision: open_clip's towers and the block, and its checkpoint."""

    def __init__(self, bias: bool = True) -> None:
        torch.manual_seed(0)
        self.clip = CLIP(D, VISION, TEXT, **({"init_logit_bias": -4.0} if bias else {})).double()
        self.block = Block().double()
        for parameter in (*self.clip.parameters(), *self.block.parameters()):
            parameter.data += 0.05 * torch.randn_like(parameter)
        towers = {PROJECTIONS.get(name, name): value for name, value in self.clip.state_dict().items()}
        self.state = towers | {f"visual_proj.{name}": value for name, value in self.block.state_dict().items()}

    def write(self, path: Any, **change: Tensor) -> Any:
        save_file({name: value.contiguous().float() for name, value in (self.state | change).items()}, path)
        return path


@pytest.fixture(scope="module")
def released() -> Released:
    return Released()


@pytest.fixture(scope="module")
def file(released, tmp_path_factory) -> Any:
    return released.write(tmp_path_factory.mktemp("flair") / "flair.safetensors")


def test_embeddings_equal(released, file):
    """CLS, patches, texts and pooled images, whose patches attend in the last block; by both loaders."""
    pictures = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    tokens = [[[57, 3, 9, END], [57, END]], [[57, 8, 8, 8, END]], [[57, 1, END], [57, 2, 2, END]]]
    padded = torch.zeros(5, 77, dtype=torch.int64)
    for row, text in zip(padded, (text for image in tokens for text in image), strict=True):
        row[: len(text)] = torch.tensor(text)
    with torch.no_grad():
        clip = released.clip.eval()
        cls, patches = clip.visual(pictures)
        patches, texts = patches @ clip.visual.proj, clip.encode_text(padded)
        pooled = released.block(texts.expand(3, -1, -1), patches)
        for load in (load_published, load_checkpoint):
            model = load(file, head_width=8, pool_heads=HEADS).double().eval()
            model.load_state_dict(from_flair(released.state))  # the file's are rounded to float32
            found = (*model.encode_image(pictures), model.encode_text(RaggedTexts.of(tokens)))
            found += (model.pool(found[1], found[2]),)
            for ours, truth in zip(found, (cls, patches, texts, pooled), strict=True):
                torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-10)
            assert model.logit_scale == model.pool.logit_scale == clip.logit_scale
            assert model.logit_bias == clip.logit_bias and not model.logit_bias.requires_grad


def test_load(file, monkeypatch):
    model = betaclip.load(file, device="cpu", head_width=8, pool_heads=HEADS)
    assert model.conditioned_similarity(torch.rand(2, 3, 24, 24), []).shape == (2, 0)
    monkeypatch.setattr(model, "tokenizer", lambda text: [57, len(text), END])
    attention = model.attention(torch.rand(3, 24, 24), ["a dog", "a cat!"])
    assert attention.shape == (2, 3, 3)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))
    assert model.model.context_length == 77 and not model.model.config.quick_gelu


@pytest.mark.parametrize("context_length", [77, 248])
def test_pretrained(context_length, file):
    """Weights to train on, in settings like those of the recipe; positions are stretched afterwards."""
    towers = json.dumps(flair_config(Released().state, 8, 8))
    settings = {"name": towers, "context_length": context_length, "pool_heads": HEADS, **FLAIR_SETTINGS}
    loaded = create_model(ModelConfig(**settings, pretrained=str(file)))
    again = load_published(file, head_width=8, pool_heads=HEADS)
    for name, value in again.pool.state_dict().items():
        assert torch.equal(loaded.pool.state_dict()[name], value)
    assert torch.equal(loaded.clip.positional_embedding[:20], again.clip.positional_embedding[:20])
    for name, value in {"pool_add_zero_attn": False, "attended_patches": False, "pool_mlp_ratio": 4.0}.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*, as FLAIR's weights need it, got {value}"):
            create_model(ModelConfig(**settings | {name: value}, pretrained=str(file)))


def test_layout_and_back(released):
    assert is_flair(released.state) and not is_flair(released.clip.state_dict())
    ours = from_flair(released.state)
    back = to_flair(ours)
    assert back.keys() == released.state.keys()
    assert all(torch.equal(back[name], value) for name, value in released.state.items())


def test_scalars_of_one_element_and_models_without_bias(released, tmp_path):
    change = {name: released.state[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    model = load_published(released.write(tmp_path / "a.safetensors", **change), head_width=8, pool_heads=HEADS)
    assert model.logit_bias.item() == pytest.approx(released.state["logit_bias"].item())
    without = load_published(Released(bias=False).write(tmp_path / "b.safetensors"), head_width=8, pool_heads=HEADS)
    assert without.logit_bias is None


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "visual.conv1.weight",
            torch.zeros(24, 3, 8),
            r"visual.conv1.weight: expected \(width, 3, patch, patch\), got",
        ),
        ("visual.positional_embedding", torch.zeros(9, 24), "visual.positional_embedding: expected 1 [+] the square"),
        ("visual_proj.ln_k.weight", torch.zeros(8), r"visual_proj.ln_k.weight: expected shape \(16,\), got \(8,\)"),
        ("visual_proj.mlp.weight", torch.zeros(8), "it also has visual_proj.mlp.weight"),
    ],
)
def test_rejects(name, value, message, released, tmp_path):
    path = released.write(tmp_path / "x.safetensors", **{name: value})
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_published(path, head_width=8, pool_heads=HEADS)


def test_rejects_missing_tensors(released, tmp_path):
    for name in ("image_post.proj", "logit_scale"):
        state = {other: value for other, value in released.state.items() if other != name}
        save_file({other: value.contiguous().float() for other, value in state.items()}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"x.safetensors: (it lacks )?{name}"):
            load_published(tmp_path / "x.safetensors", head_width=8, pool_heads=HEADS)


def test_the_published_layout_cannot_hold_it(file, tmp_path):
    model = load_published(file, head_width=8, pool_heads=HEADS)
    with pytest.raises(
        NotImplementedError, match=r"pooling block is FLAIR's in part .*; its patches attend in the last"
    ):
        save_published(model, tmp_path / "x.safetensors")

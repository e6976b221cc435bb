"""open_clip's models as they are, against open_clip's own preprocessing, tokenizer and encoders."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file
from support.towers import clip_model
from torch import Tensor, nn

from betaclip.model import plain_clip
from betaclip.model.plain_clip import PlainClip, create_plain
from betaclip.model.texts import RaggedTexts

TEXTS = ["a red mug", "A dog's " * 50]
SIGLIP = {"mean": [0.5, 0.4, 0.6], "std": [0.5, 0.25, 0.5], "resize_mode": "squash", "interpolation": "bicubic"}


def vision(**options: Any) -> dict[str, Any]:
    return {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8, **options}


def timm_vision() -> dict[str, Any]:
    return {"image_size": 32, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none"}


TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
# As SigLIP's text tower, but for its tokenizer, which needs a network.
LAST = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip": ({"vision_cfg": vision(), "text_cfg": TEXT}, {}, {"grid": (4, 4)}),
    "avg": ({"vision_cfg": vision(pool_type="avg"), "text_cfg": LAST, "custom_text": True}, SIGLIP, {"grid": (4, 4)}),
    "siglip": ({"vision_cfg": timm_vision(), "text_cfg": LAST, "custom_text": True, "init_logit_bias": -10}, SIGLIP,
               {"grid": (2, 2)}),
    "resnet": ({"vision_cfg": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 16}, "text_cfg": TEXT}, {},
               {"grid": (0, 0)}),
}  # fmt: skip


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's models with one block, on pictures of 32 pixels."""
    import timm

    create = timm.create_model
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **sizes, **options))


def local_dir(folder: Path, kind: str) -> str:
    """A folder as open_clip writes it, with random weights."""
    config, preprocess, _ = KINDS[kind]
    config = {"embed_dim": 12, **config}
    options = {name: value for name, value in config.items() if name != "custom_text"}
    torch.manual_seed(0)
    model = (CustomTextCLIP if "custom_text" in config else CLIP)(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=0.3, std=0.3)
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def encoded(model: PlainClip, picture: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        image, patches = model.encode_image(model.transform(picture)[None])
        texts = model.encode_text(RaggedTexts.of([[model.tokenizer(text)] for text in TEXTS]))
    return image, patches, texts


@pytest.mark.usefixtures("small_timm")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_open_clip(tmp_path: Path, kind: str) -> None:
    name = local_dir(tmp_path, kind)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    model = create_plain(name, None)
    image, patches, texts = encoded(model, picture)
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        torch.testing.assert_close(image, theirs.eval().encode_image(preprocess(picture)[None]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(texts, theirs.encode_text(open_clip.get_tokenizer(name)(TEXTS)))
    rows, columns = model.patch_grid
    assert (rows, columns) == KINDS[kind][2]["grid"] and patches.shape == (1, rows * columns, 12)
    assert model.embed_dim == 12 and model.image_size == 32 and model.pool is None and not model.training


@pytest.mark.parametrize("known", [True, False])
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Weights of open_clip's trainer; OpenAI's archives say their activation."""
    config = json.dumps({"embed_dim": 12, **KINDS["clip"][0]})
    if known:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", json.loads(config))
        config = "tiny"
    torch.manual_seed(0)
    clip = CLIP(embed_dim=12, **KINDS["clip"][0], quick_gelu=True)
    state = clip.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_3.pt")
    sizes = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | sizes, tmp_path / "openai.pt")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    gelu, quick = (encoded(create_plain(config, str(tmp_path / f)), picture)[0] for f in ("epoch_3.pt", "openai.pt"))
    with torch.no_grad():
        truth = clip.eval().encode_image(create_plain(config, str(tmp_path / "openai.pt")).transform(picture)[None])
    torch.testing.assert_close(quick, truth)
    assert not torch.allclose(gelu, truth, atol=1e-4)


def save(path: Path, clip: nn.Module) -> Path:
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, path)
    return path


def test_preprocessing_of_files(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The file does not say it: what all tags of the model say, else OpenAI's, with a warning."""
    assert plain_clip._agreed_preprocessing("ViT-B-16-SigLIP")["resize_mode"] == "squash"
    assert plain_clip._agreed_preprocessing("ViT-B-16")["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert not caplog.records
    assert plain_clip._agreed_preprocessing("ViT-L-14") == {}
    assert "pictures are prepared as for OpenAI's models; weights of ViT-L-14 differ in that" in caplog.text


@pytest.mark.parametrize(
    "name, pretrained, message",
    [
        ("ViT-B-61", "openai", "name: expected a model of open_clip, got 'ViT-B-61'; the nearest is 'ViT-B-16'"),
        (
            "ViT-B-16",
            "opeani",
            "expected a file, or one of openai, .*; got 'opeani'; the nearest is 'openai'",
        ),
        ("ViT-B-16-SigLIP", "openai", "one of webli for ViT-B-16-SigLIP; got 'openai'; the nearest is 'webli'"),
        ("ViT-B-16", None, "pretrained: expected a file or one of openai, .* for ViT-B-16"),
        ("scenes", None, "pretrained: expected a file for scenes"),
        ("scenes", "openai", "pretrained: expected a file for this model, got 'openai'"),
        ("{no", "nowhere.pt", "pretrained: expected a file for this model, got 'nowhere.pt'"),
        ("local-dir:nowhere", None, "name: open_clip cannot make local-dir:nowhere: .*nowhere"),
        ("local-dir:nowhere", "openai", "pretrained: expected none, because local-dir:nowhere has weights of its own"),
    ],
)
def test_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pretrained: str | None, message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        create_plain(name, pretrained)
    assert "\n" not in str(raised.value)


def test_weights_of_another_model(tmp_path: Path) -> None:
    file = save(tmp_path / "x.safetensors", clip_model())
    with pytest.raises(ValueError, match=r"pretrained: .*x.safetensors does not fit scenes: "):
        create_plain("scenes", str(file))
    local_dir(tmp_path, "clip")
    (tmp_path / "open_clip_model.safetensors").unlink()
    file.unlink()
    with pytest.raises(ValueError, match=r"name: open_clip cannot make local-dir:.*: Required pretrained weights"):
        create_plain(f"local-dir:{tmp_path}", None)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def unreachable(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils").warning("Retrying")
        raise OSError("We couldn't connect to the host\nCheck your connection\nor see")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"^pretrained: the weights openai of ViT-B-16 cannot be fetched \(Failed .*"
                       r"We couldn't connect to the host\); give the path of a file that holds them$"):  # fmt: skip
        create_plain("ViT-B-16", "openai")
    assert not caplog.records
    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    name = local_dir(tmp_path, "clip")
    with pytest.raises(ValueError, match=r"^name: open_clip cannot load the tokenizer of local-dir:.*to the host$"):
        create_plain(name, None)

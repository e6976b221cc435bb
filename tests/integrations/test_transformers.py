"""The embeddings of transformers' CLIP and SigLIP models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra 'test'")

from betaclip.integrations.transformers import encode  # noqa: E402

SIZE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = 40


def clip() -> Any:
    text = SIZE | {"vocab_size": WORDS, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": WORDS - 1}
    vision = SIZE | {"hidden_size": 16, "image_size": 24, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return transformers.CLIPModel(config).eval()


def siglip() -> Any:
    text = SIZE | {"vocab_size": WORDS, "max_position_embeddings": 8}
    vision = SIZE | {"image_size": 24, "patch_size": 8}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()


def siglip2() -> Any:
    text = SIZE | {"vocab_size": WORDS, "max_position_embeddings": 8}
    vision = SIZE | {"num_patches": 9, "patch_size": 8}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision)).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """2 images of 9 patches, 3 texts each, of which the last of each image is two tokens shorter."""
    ids = torch.randint(1, WORDS - 1, (2, 3, 8))
    ids[..., -1] = WORDS - 1
    ids[:, 2, -3:] = WORDS - 1
    mask = torch.ones_like(ids)
    mask[:, 2, -2:] = 0
    return torch.randn(2, 3, 24, 24), ids, mask


@pytest.mark.parametrize("create", [clip, siglip])
def test_encode(create: Any) -> None:
    model, (pixels, ids, mask) = create(), inputs()
    with torch.no_grad():
        out = encode(model, pixels, ids, mask)
        whole = model(input_ids=ids.flatten(0, 1), pixel_values=pixels, attention_mask=mask.flatten(0, 1))
        tokens = model.vision_model(pixels).last_hidden_state
    for found, expected in ((out.image, whole.image_embeds), (out.texts.flatten(0, 1), whole.text_embeds)):
        torch.testing.assert_close(nn.functional.normalize(found, dim=-1), expected)
    assert out.texts.shape[:2] == (2, 3)
    if create is siglip:
        torch.testing.assert_close(model.vision_model.head(out.patches), out.image)
    else:
        token = nn.functional.layer_norm(
            tokens[1, 4], (16,), model.vision_model.post_layernorm.weight, model.vision_model.post_layernorm.bias
        )
        torch.testing.assert_close(out.patches[1, 3], model.visual_projection.weight @ token)
        assert out.patches.shape == (2, 9, 12)
    torch.testing.assert_close(
        encode(model, pixels, ids.flatten(0, 1), mask.flatten(0, 1)).texts, out.texts.flatten(0, 1)
    )


def test_encode_siglip2() -> None:
    """Pictures of different shapes come as patches with a mask, which the vision tower needs."""
    model, (_, ids, _) = siglip2(), inputs()
    mask, shapes = torch.tensor([[1] * 9, [1] * 6 + [0] * 3]), torch.tensor([[3, 3], [2, 3]])
    vision = {"pixel_attention_mask": mask, "spatial_shapes": shapes}
    pixels = torch.randn(2, 9, 3 * 8 * 8)
    with torch.no_grad():
        out = encode(model, pixels, ids, **vision)
        expected = model(input_ids=ids.flatten(0, 1), pixel_values=pixels, **vision)
    torch.testing.assert_close(nn.functional.normalize(out.image, dim=-1), expected.image_embeds)
    assert out.patches.shape == (2, 9, 24) and out.texts.shape == (2, 3, 24)


def test_gradients_reach_both_towers() -> None:
    model, (pixels, ids, _) = clip(), inputs()
    sum(t.square().sum() for t in encode(model, pixels, ids)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None and name != "logit_scale"]


def test_refuses_other_models() -> None:
    pixels, ids, _ = inputs()
    with pytest.raises(NotImplementedError, match="expected a CLIP or SigLIP of transformers, got Linear, which lacks"):
        encode(nn.Linear(2, 2), pixels, ids)
    config = transformers.SiglipConfig(
        text_config=SIZE | {"vocab_size": WORDS, "max_position_embeddings": 8},
        vision_config=SIZE | {"image_size": 24, "patch_size": 8, "vision_use_head": False},
    )
    with pytest.raises(NotImplementedError, match="expected a SigLIP with a head"):
        encode(transformers.SiglipModel(config), pixels, ids)

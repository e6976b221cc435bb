"""The vision tower: CLS as open_clip's, patches by the value path of the last block."""

import copy

import pytest
import torch
from open_clip.model import CLIP
from support.towers import clip_model, gradients
from torch import Tensor, nn

from betaclip.model.vision_tower import encode_patches, prepare_vision, why_not_vision

TOWERS = {
    "GELU": dict(),
    "QuickGELU": dict(quick_gelu=True),
    "LayerScale": dict(vision={"ls_init_value": 0.1}),
    "no first norm": dict(vision={"no_ln_pre": True}),
    "one layer": dict(vision={"layers": 1}),
    "fixed positions": dict(vision={"pos_embed_type": "sin_cos_2d"}),
}


@pytest.fixture(params=TOWERS)
def towers(request) -> tuple[nn.Module, nn.Module]:
    """open_clip's own, and a copy of it with adopted blocks."""
    clip = clip_model(CLIP, **TOWERS[request.param]).double()
    assert not why_not_vision(clip)
    adopted = copy.deepcopy(clip)
    prepare_vision(adopted)
    return clip.visual, adopted.visual


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, dtype=torch.float64)


def by_value_path(visual: nn.Module, pictures: Tensor) -> Tensor:
    """(B, 1 + P, D): every token of the last block takes its own value; for patches, the published definition.

    open_clip's blocks before; then each value is taken by the output projection alone.
    """
    x = visual._embeds(pictures)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    width = x.shape[-1]
    value = last.ln_1(x) @ last.attn.in_proj_weight[2 * width :].T + last.attn.in_proj_bias[2 * width :]
    x = x + last.ls_1(value @ last.attn.out_proj.weight.T + last.attn.out_proj.bias)
    x = x + last.ls_2(last.mlp(last.ln_2(x)))
    return visual.ln_post(x) @ visual.proj


def assert_same_gradients(ours: Tensor, visual: nn.Module, expected: Tensor, reference: nn.Module) -> None:
    names = [name for name, p in reference.named_parameters() if p.requires_grad]
    pairs = [[module.get_parameter(name) for name in names] for module in (visual, reference)]
    for name, a, b in zip(names, gradients(ours, pairs[0]), gradients(expected, pairs[1]), strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max()), name


def test_matches_open_clip_and_the_value_path(towers):
    reference, visual = towers
    pictures = images()
    expected = torch.cat((reference(pictures)[:, None], by_value_path(reference, pictures)[:, 1:]), dim=1)
    out = encode_patches(visual, pictures, checkpointing=False)
    assert out.shape == (2, 1 + 9, 12)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert_same_gradients(out, visual, expected, reference)


def test_open_clips_own_call_still_works(towers):
    reference, visual = towers
    pictures = images()
    torch.testing.assert_close(visual(pictures), reference(pictures), atol=1e-12, rtol=1e-12)
    assert list(visual.state_dict()) == list(reference.state_dict())


def test_patches_are_row_by_row():
    """A picture that differs in one patch gives others only there, where nothing mixes: with a single layer."""
    clip = clip_model(CLIP, vision={"layers": 1}).double()
    prepare_vision(clip)
    picture = images(1)
    other = picture.clone()
    other[:, :, 8:16, 16:24] += 1  # second row, third column
    differs = (encode_patches(clip.visual, picture, False) != encode_patches(clip.visual, other, False)).any(2)[0]
    assert differs.nonzero().flatten().tolist() == [0, 1 + 1 * 3 + 2]


def test_checkpointing(towers):
    _, visual = towers
    pictures = images()
    out, expected = (encode_patches(visual, pictures, checkpointing) for checkpointing in (True, False))
    assert_same_gradients(out, visual, expected, visual)
    kept: list[int] = []
    for checkpointing in (True, False):
        kept.append(0)

        def keep(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encode_patches(visual, pictures, checkpointing)
    assert kept[0] < kept[1] / 2


def test_no_images():
    clip = clip_model().double()
    prepare_vision(clip)
    out = encode_patches(clip.visual, images(0), False)
    assert out.shape == (0, 10, 12)
    assert all(not grad.any() for grad in gradients(out, list(clip.visual.parameters())))


def test_autocast():
    clip = clip_model(quick_gelu=True).double()
    prepare_vision(clip)
    pictures = images()
    exact = encode_patches(clip.visual, pictures, False)
    clip.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = encode_patches(clip.visual, pictures.float(), False)
    assert out.dtype == torch.bfloat16
    assert 1e-4 < (out - exact).norm() / exact.norm() < 0.02


def test_compile():
    """A block is one graph."""
    clip = clip_model(vision={"layers": 2}).double()
    prepare_vision(clip)
    pictures = images()
    expected = encode_patches(clip.visual, pictures, False)
    for block in clip.visual.transformer.resblocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(encode_patches(clip.visual, pictures, False), expected)


@pytest.mark.parametrize(
    "vision, reason",
    [
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "the vision tower pools by attention (attentional_pool)"),
        ({"pool_type": "avg"}, "the vision tower's pool_type is 'avg'"),
        ({"patch_dropout": 0.5}, "the vision tower drops patches (patch_dropout)"),
        ({"image_size": (24, 32)}, "images are not square but (24, 32)"),
        ({"scale_attn": True}, "the vision tower has blocks of kind CustomResidualAttentionBlock"),
        ({"layers": [1, 1, 1, 1], "image_size": 64}, "the vision tower is a ModifiedResNet"),
    ],
)
def test_why_not(vision, reason):
    (found,) = why_not_vision(clip_model(vision=vision))
    assert found.startswith(reason)


def test_why_not_lists_all():
    vision = {"pool_type": "avg", "patch_dropout": 0.5, "image_size": (24, 32), "qk_norm": True}
    assert len(why_not_vision(clip_model(vision=vision))) == 4

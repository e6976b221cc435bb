"""The vision tower: CLS as open_clip's, patches by the value path of the last block."""

import copy

import pytest
import torch
from open_clip.model import CLIP
from support.adapters import Adapter, hooked
from support.towers import clip_model, gradients
from torch import Tensor, nn
from torch.nn.utils import parametrize

from betaclip.model.vision_tower import encode_patches, prepare_vision, vision_not_supported_reasons

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
    """open_clip's own, and a copy of it with replaced blocks."""
    clip = clip_model(CLIP, **TOWERS[request.param]).double()
    assert not vision_not_supported_reasons(clip)
    prepared = copy.deepcopy(clip)
    prepare_vision(prepared)
    return clip.visual, prepared.visual


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, dtype=torch.float64)


def by_value_path(visual: nn.Module, pictures: Tensor) -> Tensor:
    """(B, 1 + P, D); each token takes its own value in the last block, as the published code defines it for patches."""
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attending", ["cls", "all"])
def test_cls_only(towers, attending, checkpointing):
    _, visual = towers
    pictures, rows = images(), []
    whole = encode_patches(visual, pictures, False, attending)[:, :1]
    hook = visual.transformer.resblocks[-1].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    out = encode_patches(visual, pictures, checkpointing, attending, cls_only=True)
    hook.remove()
    torch.testing.assert_close(out, whole, atol=1e-12, rtol=1e-12)
    assert_same_gradients(out, visual, whole, visual)
    assert rows == [1], "patches go through the last block"


def test_open_clips_own_call_is_unchanged(towers):
    """This includes the patches, which take their own values only when β-CLIP asks for it."""
    reference, visual = towers
    pictures = images()
    visual.output_tokens = reference.output_tokens = True
    for ours, theirs in zip(visual(pictures), reference(pictures), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert list(visual.state_dict()) == list(reference.state_dict())


def test_patches_are_row_by_row():
    """A single layer mixes no patches: pictures that differ in one patch give embeddings that differ in that one."""
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


def test_parametrized_attention_acts():
    clip = clip_model(vision={"layers": 2}).double()
    prepare_vision(clip)
    pictures = images()
    before = encode_patches(clip.visual, pictures, False)
    for block in clip.visual.transformer.resblocks:
        parametrize.register_parametrization(block.attn, "in_proj_weight", nn.Tanh())
    out, plain = encode_patches(clip.visual, pictures, False), copy.deepcopy(clip.visual)
    for block in plain.transformer.resblocks:
        parametrize.remove_parametrizations(block.attn, "in_proj_weight")
    torch.testing.assert_close(out, encode_patches(plain, pictures, False))
    assert not torch.allclose(out, before)


@pytest.mark.parametrize("wrap", [Adapter, hooked])
@pytest.mark.parametrize("layer", [0, 1])
def test_wrapped_attention_is_refused(wrap, layer):
    clip = clip_model(vision={"layers": 2}).double()
    prepare_vision(clip)
    block = clip.visual.transformer.resblocks[layer]
    block.attn = wrap(block.attn)
    with pytest.raises(NotImplementedError, match="the tower reads the weights of attn"):
        encode_patches(clip.visual, images(), False)


@pytest.mark.parametrize(
    "vision, reason",
    [
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "the vision tower pools by attention (attentional_pool)"),
        ({"pool_type": "avg"}, "the vision tower's pool_type is 'avg'"),
        ({"patch_dropout": 0.5}, "the vision tower drops patches (patch_dropout)"),
        ({"image_size": (24, 32)}, "the vision tower's images are not square but (24, 32)"),
        ({"scale_attn": True}, "the vision tower has blocks of type CustomResidualAttentionBlock"),
        ({"layers": [1, 1, 1, 1], "image_size": 64}, "the vision tower is a ModifiedResNet"),
    ],
)
def test_not_supported(vision, reason):
    (found,) = vision_not_supported_reasons(clip_model(vision=vision))
    assert found.startswith(reason)


def test_not_supported_lists_all():
    vision = {"pool_type": "avg", "patch_dropout": 0.5, "image_size": (24, 32), "qk_norm": True}
    assert len(vision_not_supported_reasons(clip_model(vision=vision))) == 4

"""BetaCLIP as a whole: what forward promises, and wrappers around it."""

import copy
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import asdict, fields, replace

import pytest
import torch
import torch.distributed as dist
from support.towers import END, START, TINY, hierarchy, padded
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from betaclip.model import BetaCLIP, ModelConfig, create_model
from betaclip.model import beta_clip as beta_clip_module
from betaclip.model.text_tower import PackedBlock
from betaclip.model.texts import RaggedTexts

IMAGES = 5


def model(**options) -> BetaCLIP:
    return create_model(ModelConfig(name=TINY, pool_heads=4, **options)).double()


def pictures(count: int = IMAGES) -> Tensor:
    return torch.randn(count, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts() -> RaggedTexts:
    return RaggedTexts.of(hierarchy(0, IMAGES))


def test_forward(texts):
    """The truth is computed from the parts, one image and one text at a time."""
    beta_clip = model()
    out = beta_clip(pictures(), texts)
    most = texts.max_texts_per_image
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "image_embeds": (IMAGES, 12),
        "text_embeds": (IMAGES, most, 12),
        "pooled_embeds": (IMAGES, most, 12),
        "mask": (IMAGES, most),
        "text_ids": (IMAGES, most),
        "logit_scale": (),
        "pool_logit_scale": (),
    }
    assert out["mask"].sum(1).tolist() == texts.counts.tolist() and 0 in texts.counts
    assert torch.equal(out["text_ids"][out["mask"]], texts.ids) and (out["text_ids"] >= 0).equal(out["mask"])
    embeds = iter(beta_clip.clip.encode_text(padded(texts, 77)))
    for image, picture in enumerate(pictures().split(1)):
        cls, patches = beta_clip.encode_image(picture)
        torch.testing.assert_close(out["image_embeds"][image], cls[0])
        for slot in range(most):
            if out["mask"][image, slot]:
                text = next(embeds)
                torch.testing.assert_close(out["text_embeds"][image, slot], text)
                torch.testing.assert_close(
                    out["pooled_embeds"][image, slot], beta_clip.pool(patches, text[None, None])[0, 0]
                )
            else:
                assert not out["text_embeds"][image, slot].any() and not out["pooled_embeds"][image, slot].any()
    assert next(embeds, None) is None
    for name, scale in (("logit_scale", beta_clip.clip.logit_scale), ("pool_logit_scale", beta_clip.pool.logit_scale)):
        torch.testing.assert_close(out[name], scale.exp())


def test_encode_text_is_in_the_texts_order(texts):
    beta_clip = model()
    torch.testing.assert_close(beta_clip.encode_text(texts), beta_clip.clip.encode_text(padded(texts, 77)))


def test_patches_are_encoded_only_to_be_pooled(texts, monkeypatch):
    beta_clip, given = model(), []
    whole = beta_clip(pictures(), texts)
    encode = beta_clip_module.encode_patches
    monkeypatch.setattr(
        beta_clip_module, "encode_patches", lambda *args, **options: given.append(options) or encode(*args, **options)
    )
    out = beta_clip(pictures(), texts, pooled=False)
    assert "pooled_embeds" not in out
    for name in ("image_embeds", "text_embeds", "mask"):
        torch.testing.assert_close(out[name], whole[name])
    others = torch.zeros(IMAGES, 1, dtype=torch.int64)
    assert beta_clip(pictures(), texts, pooled=False, other_texts=others)["scores"].shape[0] == IMAGES
    beta_clip(pictures(), texts)
    assert [options["cls_only"] for options in given] == [True, False, False]


def test_padding_texts(texts):
    """They are encoded and pooled as other texts, but are not in the mask."""
    beta_clip = model()
    levels = torch.arange(len(texts.lengths)) % 4 - 1
    plain, out = (beta_clip(pictures(), t) for t in (texts, replace(texts, levels=levels)))
    for name in ("image_embeds", "text_embeds", "pooled_embeds"):
        assert torch.equal(out[name], plain[name])
    slots, filled = texts.slots()
    assert torch.equal(out["mask"], filled & (levels[slots] >= 0)) and 0 < out["mask"].sum() < filled.sum()
    assert torch.equal(out["text_ids"], plain["text_ids"].masked_fill(~out["mask"], -1))
    assert beta_clip.end_token == 91


def test_texts_per_image(texts):
    beta_clip = model()
    narrow, wide = (beta_clip(pictures(), texts, k) for k in (None, texts.max_texts_per_image + 3))
    for name in ("text_embeds", "pooled_embeds", "mask"):
        torch.testing.assert_close(wide[name][:, : texts.max_texts_per_image], narrow[name])
        assert not wide[name][:, texts.max_texts_per_image :].any()


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing(images, checkpointing):
    """Without images or texts, a backward still reaches every parameter, and unused ones get zeros."""
    beta_clip = model(gradient_checkpointing=checkpointing)
    out = beta_clip(pictures(images), RaggedTexts.of([[]] * images))
    assert out["pooled_embeds"].shape == (images, 0, 12)
    sum(value.sum() for value in out.values() if value.requires_grad).backward()
    for name, parameter in beta_clip.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("logit_scale") and not (images and name.startswith("clip.visual")):
            assert not parameter.grad.any(), name


def test_empty_slots_of_a_chunk_without_texts():
    """Gradient caching needs this, because all micro-batches of a batch have the same slots."""
    out = model()(pictures(2), RaggedTexts.of([[], []]), 4)
    assert out["pooled_embeds"].shape == (2, 4, 12) and not out["pooled_embeds"].any() and not out["mask"].any()
    sum(out[name].sum() for name in ("text_embeds", "pooled_embeds")).backward()


def test_gradient_checkpointing(texts):
    plain = model()
    again = copy.deepcopy(plain)
    again.config = ModelConfig(**asdict(plain.config) | {"gradient_checkpointing": True})
    for beta_clip in (plain, again):
        out = beta_clip(pictures(), texts)
        (out["pooled_embeds"].square().sum() + out["image_embeds"].square().sum()).backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast(texts):
    beta_clip = model().float()
    exact = beta_clip(pictures().float(), texts)
    with torch.autocast("cpu", torch.bfloat16):
        out = beta_clip(pictures().float(), texts)
    for name in ("image_embeds", "text_embeds", "pooled_embeds"):
        error = (out[name] - exact[name]).norm() / exact[name].norm()
        assert out[name].dtype == torch.bfloat16 and 1e-4 < error < 0.03, (name, error)
    assert out["logit_scale"].dtype == torch.float32
    sum(out[name].float().sum() for name in ("pooled_embeds", "image_embeds")).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in beta_clip.parameters())


def trained(beta_clip: BetaCLIP, texts: RaggedTexts) -> dict[str, Tensor]:
    beta_clip.zero_grad()
    out = beta_clip(pictures(), texts)
    (out["pooled_embeds"].square().sum() + beta_clip.encode_text(texts).square().sum()).backward()
    return {name: p.grad.clone() for name, p in beta_clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", ["used", "made", "unpickled", "cut"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_on_texts_after_inference_mode(texts, first, checkpointing):
    """As a validation before the training does it: what the texts keep must serve a backward later."""
    beta_clip = model(gradient_checkpointing=checkpointing)
    expected = trained(beta_clip, texts)
    with torch.inference_mode():
        match first:
            case "used":
                again = RaggedTexts(*(getattr(texts, f.name) for f in fields(texts)))
            case "made":
                again = RaggedTexts.of(hierarchy(0, IMAGES))
            case "unpickled":
                again = pickle.loads(pickle.dumps(texts))
            case "cut":
                again = RaggedTexts.of(hierarchy(0, IMAGES)).of_images(0, IMAGES)
        beta_clip(pictures(), again)
    torch.testing.assert_close(trained(beta_clip, again), expected, rtol=0, atol=0)


def test_any_default_device():
    """Models are made on the CPU, and work there, whatever the default device is."""
    images, tokens = pictures(), hierarchy(0, IMAGES)
    torch.manual_seed(0)
    expected = model()(images, RaggedTexts.of(tokens))
    torch.manual_seed(0)
    torch.set_default_device("meta")
    try:
        out = model()(images, RaggedTexts.of(tokens))
    finally:
        torch.set_default_device(None)
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name], expected[name]) for name in out)


def test_clamp_scales():
    beta_clip = model()
    for value, expected in ((-1.0, 1.0), (9.0, 100.0), (2.0, 7.38905609893065)):
        for scale in (beta_clip.logit_scale, beta_clip.pool.logit_scale):
            nn.init.constant_(scale, value)
        beta_clip.clamp_scales_()
        assert [float(s.detach().exp()) for s in (beta_clip.logit_scale, beta_clip.pool.logit_scale)] == pytest.approx(
            [expected] * 2
        )


@pytest.mark.parametrize(("name", "start"), [(TINY, 1 / 0.07), ("scenes", 8), (json.loads(TINY), 5)])
def test_both_scales_start_as_the_towers_are_configured(name, start):
    if isinstance(name, dict):
        name = json.dumps({**name, "init_logit_scale": math.log(start)})
    made = create_model(ModelConfig(name=name, pool_heads=4))
    assert [float(s.detach().exp()) for s in (made.logit_scale, made.pool.logit_scale)] == pytest.approx([start] * 2)


def test_attributes():
    beta_clip = model()
    assert (beta_clip.image_size, beta_clip.patch_grid, beta_clip.context_length) == (24, (3, 3), 77)
    assert beta_clip.embed_dim == 12
    assert beta_clip.logit_scale is beta_clip.get_parameter("clip.logit_scale")
    parts = {name.split(".")[0] for name, _ in beta_clip.named_parameters()}
    assert parts == {"clip", "pool"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, t: m(pictures()[:, :, :16], t), r"images: expected \(B, 3, 24, 24\), got shape \(5, 3, 16, 24\)"),
        (lambda m, t: m(pictures(4), t), "texts: expected those of 4 images, got those of 5"),
        (lambda m, t: m(pictures(), t, 2), "texts_per_image: expected at least 8, as one image has, got 2"),
        (
            lambda m, t: m.encode_text(RaggedTexts.of([[[START, *[1] * 76, END]]])),
            "texts: expected at most 77 tokens in each, got 78",
        ),
    ],
)
def test_rejects(texts, call, message):
    with pytest.raises(ValueError, match=message):
        call(model(), texts)


# Wrappers


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(call: nn.Module, of: BetaCLIP, texts: RaggedTexts) -> dict[str, Tensor]:
    out = call(pictures(), texts)
    scaled = (out[name].square().sum() for name in ("pooled_embeds", "image_embeds", "text_embeds"))
    (sum(scaled) * out["logit_scale"] * out["pool_logit_scale"]).backward()
    whole = {name: p.grad for name, p in of.named_parameters()}
    whole = {name: g for name, g in whole.items() if of.get_parameter(name).requires_grad}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g.clone() for name, g in whole.items()}


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("bias", [None, -10.0])
def test_data_parallel(one_rank, texts, stretch, bias):
    """Every parameter that requires a gradient gets one in every step, or the second step would raise."""
    name = json.dumps(json.loads(TINY) | {"init_logit_bias": bias})
    config = ModelConfig(name=name, pool_heads=4, context_length=248 if stretch else 77)
    beta_clip = create_model(config).double()
    out = beta_clip(pictures(), texts)
    assert (bias is None and "logit_bias" not in out) or out["logit_bias"].item() == bias
    expected = gradients(beta_clip, beta_clip, texts)
    wrapped = DistributedDataParallel(beta_clip)
    for _ in range(2):
        beta_clip.zero_grad()
        torch.testing.assert_close(gradients(wrapped, beta_clip, texts), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fully_sharded(one_rank, texts, checkpointing):
    """Block by block: fully_shard's hooks see the packed texts pass."""
    beta_clip = model(context_length=248, gradient_checkpointing=checkpointing)
    expected = gradients(again := copy.deepcopy(beta_clip), again, texts)
    blocks = [*beta_clip.clip.visual.transformer.resblocks, *beta_clip.clip.transformer.resblocks]
    assert isinstance(beta_clip.clip.transformer.resblocks[0], PackedBlock)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(beta_clip, mesh=mesh, ignored_params={p for p in beta_clip.parameters() if p.dim() == 0})
    for _ in range(2):
        beta_clip.zero_grad()
        torch.testing.assert_close(gradients(beta_clip, beta_clip, texts), expected)


@pytest.mark.parametrize("target", ["attn", "out_proj", "c_fc"])
def test_lora_by_peft_acts_or_is_refused(texts, target):
    """LoRA of attn is never called by the towers and the pool, which read its weights."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra 'test'")
    beta_clip = model()
    with torch.no_grad():
        before = beta_clip(pictures(), texts)
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    adapted = peft.get_peft_model(beta_clip, config)
    if target == "attn":
        with pytest.raises(
            NotImplementedError, match=r"attn has a forward of its own .* Adapt attn.out_proj, mlp.c_fc"
        ):
            adapted(pictures(), texts)
        with pytest.raises(NotImplementedError, match="TextConditionedPool reads the weights of attn"):
            beta_clip.pool(before["pooled_embeds"], before["text_embeds"])
        return
    out = adapted(pictures(), texts)
    out["pooled_embeds"].square().sum().backward()
    for name in ("image_embeds", "text_embeds", "pooled_embeds"):
        assert (out[name] - before[name]).abs().max() > 1e-3, name
    adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    for part in ("clip.visual", "clip.transformer", "pool"):
        assert all(p.grad is not None and p.grad.any() for name, p in adapters.items() if f"model.{part}." in name), (
            part
        )
    assert len(adapters) == 2 * 5  # two blocks of each tower, and the pool

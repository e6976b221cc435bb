"""A small model in the published layout, compared with the released code's outputs, losses and gradients."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP
from safetensors.torch import load_file, save_file
from support.paths import GOLDEN
from support.published import POOL, gradients, released_checkpoint
from support.towers import clip_model
from torch import Tensor

from betaclip import BetaCALLoss, ClipLoss
from betaclip.checkpoint import set_moments
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.model.published_layout import from_published, to_published
from betaclip.model.text_tower import stretch_positions
from betaclip.model.texts import RaggedTexts
from betaclip.published import load_published, read_training_state, save_published
from betaclip.training.config import OptimizerConfig
from betaclip.training.optimizers import create_optimizer

CHECKPOINT = GOLDEN / "tiny_published_checkpoint.safetensors"
OUTPUTS = load_file(GOLDEN / "tiny_published_outputs.safetensors")
MASK = OUTPUTS["out.mask"].bool()
HEAD_WIDTH = 16  # 3 heads for vision, 2 for text


def texts() -> RaggedTexts:
    """Each text is a row up to its end token, the largest id; the released code also encodes rows of padding."""
    blocks = [OUTPUTS["in.text_tokens"], OUTPUTS["in.phrase_tokens"]]
    rows = [[row[: int(row.argmax()) + 1] for block in blocks for row in block[image]] for image in range(3)]
    return RaggedTexts.of(rows)


@pytest.fixture
def model() -> BetaCLIP:
    return load_published(CHECKPOINT, head_width=HEAD_WIDTH)


def test_outputs(model):
    out = model(OUTPUTS["in.image"], texts())
    patches = torch.cat((out["image_embeds"][:, None], model.encode_image(OUTPUTS["in.image"])[1]), dim=1)
    ours = {
        "cls_embed": out["image_embeds"],
        "patch_and_cls_embed": patches,
        "caption_embed": out["text_embeds"][:, 0],
        "text_embed_normalized": F.normalize(out["text_embeds"], dim=-1),
        "pooled_image_embed": out["pooled_embeds"],
        "logit_scale": out["logit_scale"],
        "logit_scale_pool": out["pool_logit_scale"],
    }
    assert set(ours) | {"mask"} == {name[4:] for name in OUTPUTS if name.startswith("out.")}
    for name, value in ours.items():
        torch.testing.assert_close(value, OUTPUTS[f"out.{name}"], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_losses_and_gradients(model, form):
    out = model(OUTPUTS["in.image"], texts())
    beta_cal = BetaCALLoss(form, padding="published")(
        out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"], mask=MASK
    )
    contrast = ClipLoss()(out["image_embeds"], out["text_embeds"][:, 0], out["logit_scale"])
    total = contrast + beta_cal
    for name, value in (("global", contrast), ("beta_cal", beta_cal), ("total", total)):
        torch.testing.assert_close(value, OUTPUTS[f"{form}.loss_{name}"], atol=1e-4, rtol=0)
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    frozen = torch.zeros(20, 32)
    start = "clip.parametrizations.positional_embedding."
    grads |= {start + "0.frozen": torch.zeros(248, 32), start + "0.unused": frozen}
    ours = to_published(grads)
    expected = {name.split(".grad.")[1]: g for name, g in OUTPUTS.items() if name.startswith(f"{form}.grad.")}
    assert len(expected) == 9
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0)


def test_round_trip(model, tmp_path):
    save_published(model, tmp_path / "x.safetensors")
    theirs, ours = load_file(CHECKPOINT), load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_every_tensor_has_its_place():
    """The checkpoint's numbers all differ, so tensors of the same shape cannot be swapped unseen."""
    first = 0.0
    state = {}
    for name, tensor in load_file(CHECKPOINT).items():
        state[name] = torch.arange(first, first + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        first += tensor.numel()
    again = to_published(from_published(state))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_config_makes_the_model_again(model):
    again = create_model(model.config)
    again.load_state_dict(model.state_dict())
    out, expected = (m(OUTPUTS["in.image"], texts())["pooled_embeds"] for m in (again, model))
    assert torch.equal(out, expected)


def test_as_pretrained(model):
    """A published file as ``pretrained`` brings QuickGELU; the configuration must have its context length."""
    config = ModelConfig(name=model.config.name, context_length=248, pretrained=str(CHECKPOINT))
    again = create_model(config)
    assert again.config.quick_gelu
    assert torch.equal(again(OUTPUTS["in.image"], texts())["pooled_embeds"],
                       model(OUTPUTS["in.image"], texts())["pooled_embeds"])  # fmt: skip
    with pytest.raises(ValueError, match=r"pretrained: .* does not fit"):
        create_model(ModelConfig(name=model.config.name, context_length=77, pretrained=str(CHECKPOINT)))


def test_wrapped(model, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in load_file(CHECKPOINT).items()}
    torch.save({"model": state, "epoch": 5, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "x.pt")
    again = load_published(tmp_path / "x.pt", head_width=HEAD_WIDTH)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_pretrained_names_the_settings(model):
    """What a configuration lacks is said in its own words."""
    config = ModelConfig(name=model.config.name, context_length=248, pretrained=str(CHECKPOINT))
    for change, message in (
        ({"context_length": 77}, "expected context_length 248, got 77$"),
        ({"pool_norm_inputs": True}, "pool_norm_inputs: expected False, as the file's pooling block is, got True$"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(replace(config, **change))


def test_files_of_the_released_code(model, tmp_path):
    torch.save(released_checkpoint(load_file(CHECKPOINT)), tmp_path / "x.pt")
    config = ModelConfig(name=model.config.name, context_length=248, pretrained=str(tmp_path / "x.pt"))
    for again in (load_published(tmp_path / "x.pt", head_width=HEAD_WIDTH), create_model(config)):
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_training_state_of_the_released_code(model, tmp_path):
    """Each moment is of the gradient of its parameter, and AdamW goes on from it as from its own."""
    state = load_file(CHECKPOINT)
    torch.save(released_checkpoint(state), tmp_path / "x.pt")
    found = read_training_state(tmp_path / "x.pt")
    assert found.epochs == 5
    expected = from_published(gradients(state))
    trained = dict(model.named_parameters())
    assert found.moments.keys() == trained.keys()
    optimizer = create_optimizer(model, OptimizerConfig())
    set_moments(model, optimizer, found.moments)
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        torch.testing.assert_close(moments["exp_avg"], 0.1 * expected[name], msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(moments["exp_avg_sq"], 0.001 * expected[name] ** 2)
        assert moments["step"].item() == 1
    assert {group["part"] for group in optimizer.param_groups} == {"backbone", "pool"}


def test_frozen_parameters_in_the_released_optimizers(tmp_path):
    """A table without gradients may be among the parameters; it is then numbered and has no state."""
    content = released_checkpoint(state := load_file(CHECKPOINT))
    names = [n for n, value in state.items() if not n.startswith(POOL) and value.dim() > 1]
    place, group = names.index("positional_embedding"), content["optimizer"]["param_groups"][0]
    group["params"] = [*group["params"][:place], 10**6, *group["params"][place:]]
    torch.save(content, tmp_path / "x.pt")
    found = read_training_state(tmp_path / "x.pt").moments["clip.visual.proj"]["exp_avg"]
    torch.testing.assert_close(found, 0.1 * gradients(state)["image_projection"])


def _without(content: dict, key: str) -> dict:
    return {k: v for k, v in content.items() if k != key}


def _first(change: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """Change the first parameter's state in the first optimiser."""

    def changed(content: dict) -> dict:
        optimizer = content["optimizer"]
        first = change(optimizer["state"][0])
        return content | {"optimizer": optimizer | {"state": optimizer["state"] | {0: first}}}

    return changed


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: _without(_without(c, "optimizer"), "optimizer_pool"), "expected optimisers .* got the keys epoch"),
        (lambda c: _without(c, "epoch"), "epoch: expected the number of completed epochs, got 'None'"),
        (_first(lambda s: _without(s, "exp_avg")), "optimizer: expected the state dict of AdamW: KeyError 'exp_avg'"),
        (_first(lambda s: s | {"exp_avg": torch.ones(3)}), "optimizer: expected groups .* that fits none"),
        (_first(lambda s: s | {"exp_avg_sq": torch.ones(3)}), "optimizer: exp_avg_sq of .*: expected the shape of"),
        (_first(lambda s: s | {"exp_avg": s["exp_avg"] * torch.nan}), "optimizer: exp_avg of .*: expected finite"),
        (
            lambda c: c | {"state_dict": _without(c["state_dict"], "module.transformer.resblocks.1.attn.k_proj.bias")},
            "expected all weights of the published layout: .*resblocks.1.attn.k_proj.bias|.* that fits none",
        ),
        (lambda c: c | {"optimizer": {"state": {}, "param_groups": 3}}, "optimizer: expected the state dict of AdamW"),
    ],
    ids=["none", "epoch", "no moment", "shape", "other shape", "NaN", "weights", "no groups"],
)
def test_training_state_rejects(tmp_path, change, message):
    torch.save(change(released_checkpoint(load_file(CHECKPOINT))), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"^.*x\.pt: {message}") as raised:
        read_training_state(tmp_path / "x.pt")
    assert "\n" not in str(raised.value)


def test_pickles_only_if_asked(tmp_path):
    torch.save({"model": load_file(CHECKPOINT), "args": re.compile("x")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="allow_pickle"):
        load_published(tmp_path / "x.pt", head_width=HEAD_WIDTH)
    assert load_published(tmp_path / "x.pt", head_width=HEAD_WIDTH, allow_pickle=True).embed_dim == 32


def test_input_norms(tmp_path):
    """The pooling block has LayerNorms of its inputs where the file has their weights."""
    state = load_file(CHECKPOINT)
    for name in ("ln_1", "ln_1_kv"):
        state |= {f"text_conditioned_patches_block.{name}.{kind}": torch.rand(32) for kind in ("weight", "bias")}
    save_file(state, tmp_path / "x.safetensors")
    model = load_published(tmp_path / "x.safetensors", head_width=HEAD_WIDTH)
    assert model.config.pool_norm_inputs
    assert torch.equal(model.pool.ln_1_kv.bias, state["text_conditioned_patches_block.ln_1_kv.bias"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {n: t for n, t in s.items() if n != "positional_embedding_res"}, "lacks positional_embedding_res$"),
        (lambda s: s | {"visual.extra": torch.zeros(1)}, "it also has visual.extra$"),
        (lambda s: {n: t for n, t in s.items() if n != "visual.norm.bias"}, "it lacks visual.norm.bias$"),
        (
            lambda s: s | {"text_projection": torch.zeros(32, 33)},
            r"text_projection: expected shape \(32, 32\), got \(32, 33\)$",
        ),
        (
            lambda s: s | {"visual.pos_embed": torch.zeros(1, 16, 48)},
            r"visual.pos_embed: expected 1 \+ the square of a number of rows, got 16$",
        ),
        (
            lambda s: s | {"positional_embedding": torch.zeros(247, 32)},
            "positional_embedding: expected 20 rows and a multiple of 4, got 247$",
        ),
    ],
    ids=["layout", "extra", "missing", "shape", "grid", "length"],
)
def test_rejects(tmp_path, change, message):
    save_file(change(load_file(CHECKPOINT)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"^.*x\.safetensors: .*{message}"):
        load_published(tmp_path / "x.safetensors", head_width=HEAD_WIDTH)


@pytest.mark.parametrize("width", [64, 0])
def test_rejects_heads(width):
    message = f"tiny.*: head_width: expected a divisor of the vision tower's width 48, got {width}"
    with pytest.raises(ValueError, match=message):
        load_published(CHECKPOINT, head_width=width)


DAMAGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda t: None,
    "0-d": lambda t: torch.tensor(1.0) if t.dim() else None,
    "one dimension more": lambda t: t[None].contiguous(),
    "one row more": lambda t: F.pad(t[None], (*[0, 0] * (t.dim() - 1), 0, 1))[0] if t.dim() else torch.zeros(1),
    "empty": lambda t: torch.empty(0),
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "infinite": lambda t: torch.full_like(t, -torch.inf),
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("load", ["load_published", "pretrained"])
def test_damaged_tensors(tmp_path, damage, load):
    """One line names the file and a tensor, whichever tensor is damaged."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    state = load_file(CHECKPOINT)
    towers = load_published(CHECKPOINT, head_width=HEAD_WIDTH).config.name
    sizes = ["visual.patch_embed.proj.weight", "visual.pos_embed", "positional_embedding", "image_projection"]
    sizes += ["transformer.resblocks.0.mlp.c_fc.weight", "visual.blocks.0.mlp.fc1.weight"]
    others = sorted(state.keys() - {*sizes, "token_embedding.weight"})  # any vocabulary will do
    for name in [*sizes, *random.Random(seed).sample(others, 2)]:
        changed = DAMAGES[damage](state[name])
        rest = {n: t for n, t in state.items() if n != name}
        save_file(rest if changed is None else rest | {name: changed}, path := tmp_path / "x.safetensors")
        with pytest.raises(ValueError) as raised:
            if load == "load_published":
                load_published(path, head_width=HEAD_WIDTH)
            else:
                create_model(ModelConfig(name=towers, context_length=248, pretrained=str(path)))
        message = str(raised.value)
        assert "\n" not in message and str(path) in message, message
        # A wrong size can also show in the tensors that it makes all others differ from.
        assert name in message or (name in sizes and re.search(r": [\w.]+: expected|it (lacks|also has) \w", message))


def test_damaged_bytes(tmp_path):
    """Whatever a file holds, either its weights are read or one line names it."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    torch.save({"state_dict": load_file(CHECKPOINT)}, tmp_path / "whole.pt")
    for whole in (CHECKPOINT, tmp_path / "whole.pt"):
        content = whole.read_bytes()
        for _ in range(50):
            damaged = bytearray(content)
            begin = draw.randrange(draw.choice([64, 4096, len(content)]))
            match draw.randrange(3):
                case 0:
                    del damaged[begin:]
                case 1:
                    damaged[begin : begin + 16] = draw.randbytes(16)
                case 2:
                    del damaged[begin : begin + draw.randrange(1, 100)]
            path = tmp_path / f"x{whole.suffix}"
            path.write_bytes(damaged)
            try:
                load_published(path, head_width=HEAD_WIDTH)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def saved(tmp_path: Path, clip: torch.nn.Module) -> None:
    save_published(BetaCLIP(clip, ModelConfig(pool_heads=2)), tmp_path / "x.safetensors")


def test_cannot_be_written(tmp_path):
    clip = clip_model(vision={"ls_init_value": 0.1, "no_ln_pre": True}, init_logit_bias=-10.0)
    with pytest.raises(NotImplementedError) as error:
        saved(tmp_path, clip)
    for reason in ("not stretched", "not QuickGELU", "LayerScale", "no LayerNorm before", "bias of the logits"):
        assert reason in str(error.value)
    with pytest.raises(NotImplementedError, match="CustomTextCLIP"):
        saved(tmp_path, clip_model(CustomTextCLIP))
    assert not list(tmp_path.iterdir())


def test_written_from_a_model_of_ours(tmp_path):
    clip = clip_model(quick_gelu=True, vision={"width": 48, "head_width": 16}, text={"width": 32, "heads": 2})
    stretch_positions(clip)
    model = BetaCLIP(clip, ModelConfig(pool_heads=2))
    save_published(model, tmp_path / "x.safetensors")
    again = load_published(tmp_path / "x.safetensors", head_width=16, pool_heads=2)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    pictures, ragged = torch.randn(1, 3, 24, 24), RaggedTexts.of([[[90, 1, 91], [90, *[2] * 30, 91]]])
    assert torch.equal(model(pictures, ragged)["pooled_embeds"], again(pictures, ragged)["pooled_embeds"])

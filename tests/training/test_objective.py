import pytest
import torch
from torch import Tensor

from betaclip import BetaCALLoss, ClipLoss
from betaclip.errors import ConfigError
from betaclip.model.texts import RaggedTexts
from betaclip.training.config import LossConfig
from betaclip.training.objective import Objective, captions

B, K, D = 5, 4, 8


def outputs(texts: int = K) -> dict[str, Tensor]:
    out = {
        "image_embeds": torch.randn(B, D),
        "text_embeds": torch.randn(B, texts, D),
        "pooled_embeds": torch.randn(B, texts, D),
        "mask": torch.arange(texts) < torch.tensor([4, 1, 2, 3, 4])[:, None],
        "logit_scale": torch.tensor(5.0),
        "pool_logit_scale": torch.tensor(9.0),
    }
    return {name: t if name == "mask" else t.requires_grad_() for name, t in out.items()}


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_sum_of_both_losses(form):
    out = outputs()
    losses = Objective(LossConfig(form, beta=0.3, alpha=0.9, global_weight=2.0, beta_cal_weight=0.5))(out)
    whole = ClipLoss()(out["image_embeds"], out["text_embeds"][:, 0], out["logit_scale"])
    parts = BetaCALLoss(form, beta=0.3, alpha=0.9)(
        out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"], mask=out["mask"]
    )
    torch.testing.assert_close(losses["global_loss"], whole)
    torch.testing.assert_close(losses["beta_cal_loss"], parts)
    torch.testing.assert_close(losses["loss"], 2 * whole + 0.5 * parts)


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_equal_texts_left_out(form):
    out = outputs()
    out["text_ids"] = torch.arange(B * K).view(B, K)
    out["text_ids"][1, 0] = out["text_ids"][3, 0] = out["text_ids"][2, 1] = out["text_ids"][0, 0]
    losses, with_all = (Objective(LossConfig(form, equal_texts=kind))(out) for kind in ("left_out", "negatives"))
    image, text, mask = out["image_embeds"], out["text_embeds"], out["mask"]
    whole = ClipLoss()(image, text[:, 0], out["logit_scale"], text_ids=out["text_ids"][:, 0])
    parts = BetaCALLoss(form)(out["pooled_embeds"], text, out["pool_logit_scale"], mask=mask, text_ids=out["text_ids"])
    torch.testing.assert_close(losses["global_loss"], whole)
    torch.testing.assert_close(losses["beta_cal_loss"], parts)
    assert losses["global_loss"] < with_all["global_loss"] and losses["beta_cal_loss"] < with_all["beta_cal_loss"]


@pytest.mark.parametrize(
    ("weights", "names", "untouched"),
    [
        ((1.0, 0.0), {"loss", "global_loss"}, {"pooled_embeds", "pool_logit_scale"}),
        ((0.0, 1.0), {"loss", "beta_cal_loss"}, {"image_embeds", "logit_scale"}),
    ],
)
def test_weight_of_zero_leaves_out(weights, names, untouched):
    out = outputs()
    losses = Objective(LossConfig(global_weight=weights[0], beta_cal_weight=weights[1]))(out)
    losses["loss"].backward()
    assert losses.keys() == names
    assert {name for name, t in out.items() if t.requires_grad and t.grad is None} == untouched


def with_others(others: int = 2) -> dict[str, Tensor]:
    out = outputs()
    valid = out["mask"][..., None] & (torch.rand(B, K, others) < 0.7)
    return out | {
        "conditioned_negatives": torch.randn(B, K, others).tanh().requires_grad_(),
        "conditioned_mask": valid,
        "conditioned_leak": valid[..., 0] & (torch.rand(B, K) < 0.5),
    }


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_conditioned_negatives(form):
    """The term alone is what they add to β-CAL; its weight is 1 unless another is given."""
    out = with_others()
    loss = BetaCALLoss(form, beta=0.3)
    given = out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"]
    others = {"conditioned_negatives": out["conditioned_negatives"], "conditioned_mask": out["conditioned_mask"]}
    added = loss(*given, mask=out["mask"], **others) - loss(*given, mask=out["mask"])
    for weights, weight in (({}, 1.0), ({"conditioned": 0.25}, 0.25)):
        objective = Objective(LossConfig(form, beta=0.3, conditioned_negatives=2, weights=weights))
        losses = objective(out)
        torch.testing.assert_close(losses["conditioned_loss"], added)
        whole = losses["global_loss"] + losses["beta_cal_loss"] + weight * added
        torch.testing.assert_close(losses["loss"], whole)
    assert objective.names == ["loss", "global_loss", "beta_cal_loss", "conditioned_loss", "leak"]
    assert list(losses) == objective.names and objective.conditioned_negatives == 2
    share = out["conditioned_leak"].sum() / out["conditioned_mask"][..., 0].sum()
    assert losses["leak"].item() == pytest.approx(share.item()) and 0 < share < 1


def test_conditioned_negatives_alone():
    losses = Objective(LossConfig(global_weight=0.0, beta_cal_weight=0.0, conditioned_negatives=2))
    out = with_others()
    losses(out)["loss"].backward()
    assert losses.needs("pool_logit_scale") and not losses.captions_only
    assert out["conditioned_negatives"].grad.any() and out["image_embeds"].grad is None
    nothing = {name: torch.zeros_like(t) if name.startswith("conditioned") else t for name, t in out.items()}
    assert losses(nothing)["loss"] == 0 == losses(nothing)["leak"]


def test_weight_of_zero_draws_no_other_pictures():
    objective = Objective(LossConfig(conditioned_negatives=2, weights={"conditioned": 0.0}))
    assert objective.conditioned_negatives == 0 and "conditioned_loss" not in objective.names


def test_image_without_text():
    """It is in neither loss, as if it were not there."""
    out = outputs()
    without = {name: t if t.dim() == 0 else t[1:] for name, t in out.items()}
    masked = out | {"mask": out["mask"].clone()}
    masked["mask"][0] = False
    ours, truth = Objective()(masked), Objective()(without)
    assert ours["loss"].isfinite()
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name])


def test_no_image():
    out = {name: t.detach()[:0] if t.dim() else t for name, t in outputs().items()}
    leaf = out["pooled_embeds"].requires_grad_()
    loss = Objective()(out)["loss"]
    loss.backward()
    assert loss == 0 and leaf.grad is not None


def test_captions():
    texts = RaggedTexts.of([[[1, 2], [3]], [], [[4, 5, 6], [7], [8, 9]], [[10]]])
    first = captions(texts)
    assert first.tokens.tolist() == [1, 2, 4, 5, 6, 10]
    assert (first.lengths.tolist(), first.image_index.tolist(), first.num_images) == ([2, 3, 1], [0, 2, 3], 4)
    assert captions(RaggedTexts.of([])).num_images == 0


def test_rejects():
    for weights in ((0.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(ConfigError, match="loss: expected weights >= 0, at least one above 0, got global"):
            Objective(LossConfig(global_weight=weights[0], beta_cal_weight=weights[1]))
    with pytest.raises(
        ConfigError, match=r"loss\.weights: expected one of global, beta_cal, conditioned, .*'globel'; .* 'global'"
    ):
        Objective(LossConfig(weights={"globel": 1.0}))
    for options, name in (
        ({"gather_global": "published"}, "loss.gather_global published"),
        ({"weights": {"multi_positive": 1.0}}, "the loss term multi_positive"),
    ):
        with pytest.raises(ConfigError, match=f"loss.equal_texts: expected negatives with {name}, got left_out"):
            Objective(LossConfig(equal_texts="left_out", **options))
    for number, weights, least in ((0, {"conditioned": 1.0}, "1 for the loss term conditioned"), (-1, {}, "0")):
        message = rf"loss\.conditioned_negatives: expected at least {least}, got {number}"
        with pytest.raises(ConfigError, match=message):
            Objective(LossConfig(conditioned_negatives=number, weights=weights))
    for number, weights, expected in ((0, {"text_conditioned": 1.0}, "at least 1"), (2, {}, "None without .*")):
        with pytest.raises(ConfigError, match=rf"loss\.sampled_pictures: expected {expected}, got {number}"):
            Objective(LossConfig(sampled_pictures=number, weights=weights))

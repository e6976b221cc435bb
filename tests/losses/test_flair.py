"""FLAIR's losses against their formulas, and both together against values of the released code."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from support.paths import GOLDEN
from support.ranks import needs_gloo, processes
from torch import Tensor

from betaclip import BetaCALLoss, TextConditionedPool
from betaclip.losses.flair import multi_positive_loss, text_conditioned_loss
from betaclip.process_group import ProcessGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, K, D = 5, 3, 8


def leaves(device: str = DEVICE) -> list[Tensor]:
    """Images, texts, scale and bias."""
    shapes = (B, D), (B, K, D), (), ()
    image, text, scale, bias = (torch.randn(s, dtype=torch.float64, device=device) for s in shapes)
    return [t.requires_grad_() for t in (image, text, scale.abs() + 4, bias - 3)]


def multi_positive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The definition: B images, all of them with K texts."""
    count, per_image = text.shape[:2]
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).flatten(0, 1).T + bias
    own = torch.eye(count, device=DEVICE).repeat_interleave(per_image, 1).bool()
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum() / (count * per_image)


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def test_multi_positive_loss():
    inputs = leaves()
    image, text, scale, bias = inputs
    ours = multi_positive_loss(image, text, scale, logit_bias=bias)
    for a, t in zip(gradients(ours, inputs), gradients(multi_positive(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, t, rtol=1e-12, atol=1e-14)


def test_multi_positive_loss_of_masked_texts():
    """Images without texts take no part; padded texts may hold anything."""
    image, text, scale, bias = inputs = leaves()
    mask = torch.ones(B, K, dtype=torch.bool, device=DEVICE)
    mask[1], mask[3] = False, False
    odd = text.masked_fill(~mask[..., None], torch.nan)
    ours = multi_positive_loss(image, odd, scale, logit_bias=bias, mask=mask)
    kept = mask[:, 0]
    truth = multi_positive(image[kept], text[kept], scale, bias)
    for a, t in zip(gradients(ours, inputs), gradients(truth, inputs), strict=True):
        torch.testing.assert_close(a, t, rtol=1e-12, atol=1e-14)
    mask[0, 2] = False
    rows = image[:, None].expand(-1, K, -1)
    truth = 3 * BetaCALLoss("bce", 1.0)(rows, text, scale, logit_bias=bias, mask=mask)
    torch.testing.assert_close(multi_positive_loss(image, odd, scale, logit_bias=bias, mask=mask), truth)
    assert multi_positive_loss(image, odd, scale, logit_bias=bias, mask=torch.zeros_like(mask)) == 0


def scores(columns: int = 6, device: str = DEVICE) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, which of them are of own texts, and which exist: the last image has none."""
    cosines = torch.randn(B, columns, dtype=torch.float64, device=device).tanh().requires_grad_()
    own, mask = (torch.rand(B, columns, device=device) < share for share in (0.4, 0.7))
    mask[0], mask[-1] = True, False
    return cosines, own, mask


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_text_conditioned_loss(masked, bias):
    """The sum over pairs, divided by the texts of an image; with a mask, by their mean number."""
    cosines, own, mask = scores()
    scale = torch.tensor(7.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    logits = scale * cosines + (bias or 0)
    losses = F.softplus(torch.where(own, -logits, logits))
    truth = losses[mask].sum() * (B - 1) / mask.sum() if masked else losses.sum() / 6
    given = cosines.masked_fill(~mask, torch.nan) if masked else cosines
    ours = text_conditioned_loss(given, own, scale, logit_bias=bias, mask=mask if masked else None)
    for a, t in zip(gradients(ours, [cosines, scale]), gradients(truth, [cosines, scale]), strict=True):
        torch.testing.assert_close(a, t, rtol=1e-12, atol=1e-14)


def test_text_conditioned_loss_of_nothing():
    cosines, own, mask = scores()
    assert text_conditioned_loss(cosines, own, 5.0, mask=torch.zeros_like(mask)) == 0
    assert text_conditioned_loss(cosines[:0], own[:0], 5.0) == 0
    half = text_conditioned_loss(cosines.detach().bfloat16(), own, 100.0, logit_bias=100.0)
    assert half.dtype == torch.float32 and half.isfinite()


def test_released_values():
    """FLAIR's objective, the mean of both losses, with its gradients to 1e-10."""
    golden = {name: t.to(DEVICE) for name, t in load_file(GOLDEN / "flair.safetensors").items()}
    names = ("image_features", "image_tokens", "text_features", "logit_scale", "logit_bias")
    image, patches, texts, scale, bias = given = [golden[name].clone().requires_grad_() for name in names]
    pool = TextConditionedPool(32, 8, 0, norm_qkv=True, add_zero_attn=True).to(DEVICE).double()
    weights = {name: t for name, t in golden.items() if name.startswith("visual_proj.")}
    pool.load_state_dict({name.removeprefix("visual_proj."): t for name, t in weights.items()}, strict=False)
    chosen = golden["chosen_texts"]
    own = chosen // 3 == torch.arange(5, device=DEVICE)[:, None]
    conditioned = text_conditioned_loss(pool.score(patches, texts, texts=chosen), own, scale, logit_bias=bias)
    multi = multi_positive_loss(image, texts.view(5, 3, 32), scale, logit_bias=bias)
    loss = (conditioned + multi) / 2
    torch.testing.assert_close(loss, golden["tcs_mps.loss"], rtol=1e-10, atol=0)
    loss.backward()
    found = dict(zip(names, given, strict=True)) | {name: pool.get_parameter(name[12:]) for name in weights}
    assert {f"tcs_mps.grad.{name}" for name in found} == {name for name in golden if name.startswith("tcs_mps.grad.")}
    for name, leaf in found.items():
        truth = golden[f"tcs_mps.grad.{name}"]
        torch.testing.assert_close(leaf.grad, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()), msg=name)


def over_two_ranks() -> None:
    """Every rank has the loss of all images, and W times the gradients of its own: ranks have 2 images and 3. On the
    CPU, since gloo sends no tensors of a GPU from rank to rank."""
    image, text, scale, bias = inputs = leaves("cpu")
    cosines, own, mask = scores(device="cpu")
    part = (slice(0, 2), slice(2, 5))[dist.get_rank()]
    truth = multi_positive_loss(image, text, scale, logit_bias=bias, gather=False)
    for gather in ("all_gather", "ring"):
        ours = multi_positive_loss(image[part], text[part], scale, logit_bias=bias, gather=gather)
        torch.testing.assert_close(ours, truth)
        for a, t in zip(*(torch.autograd.grad(x, inputs[:2], retain_graph=True) for x in (ours, truth)), strict=True):
            torch.testing.assert_close(a[part] / 2, t[part])
    truth = text_conditioned_loss(cosines, own, scale, logit_bias=bias, mask=mask)
    ours = text_conditioned_loss(
        cosines[part], own[part], scale, logit_bias=bias, mask=mask[part], group=ProcessGroup.of()
    )
    torch.testing.assert_close(ours, truth)
    (a,), (t,) = (torch.autograd.grad(x, cosines) for x in (ours, truth))
    torch.testing.assert_close(a[part] / 2, t[part])


@needs_gloo
def test_over_two_ranks(tmp_path):
    processes(2, over_two_ranks, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_embeds": torch.ones(2, 3, 4)}, r"image_embeds: expected \(B, D\), got shape \(2, 3, 4\)"),
        ({"text_embeds": torch.ones(6, 4)}, r"text_embeds: expected \(B, K, D\), got shape \(6, 4\)"),
        ({"image_embeds": torch.ones(3, 4)}, r"text_embeds: expected shape \(3, 3, 4\) as image_embeds, got"),
        ({"mask": torch.ones(2, 2) > 0}, r"mask: expected shape \(2, 3\)"),
        ({"text_embeds": None}, "text_embeds: expected a tensor, got NoneType"),
    ],
)
def test_multi_positive_loss_rejects(change, message):
    given = {"image_embeds": torch.ones(2, 4), "text_embeds": torch.ones(2, 3, 4), "logit_scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        multi_positive_loss(**given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cosines": torch.ones(2, 3, 4)}, r"cosines: expected floating-point \(B, Q\), got torch.float32 \(2, 3, 4\)"),
        ({"cosines": torch.ones(2, 3).long()}, r"cosines: expected floating-point \(B, Q\), got torch.int64"),
        ({"own": torch.ones(2, 3)}, r"own: expected bool of shape \(2, 3\), got torch.float32"),
        ({"mask": torch.ones(2, 4) > 0}, r"mask: expected bool of shape \(2, 3\), got torch.bool \(2, 4\)"),
        ({"own": torch.ones(2, 3, device="meta") > 0}, "own: expected device cpu as cosines, got meta"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale: expected a floating-point scalar"),
    ],
)
def test_text_conditioned_loss_rejects(change, message):
    given = {"cosines": torch.ones(2, 3), "own": torch.ones(2, 3) > 0, "logit_scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        text_conditioned_loss(**given)

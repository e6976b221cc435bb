"""CLIP's loss: against its formula, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from betaclip import ClipLoss, beta_cal_ce_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_one_text_per_image_is_clip():
    image, text = (
        torch.randn(9, 16, dtype=torch.float64, device=DEVICE),
        torch.randn(9, 16, dtype=torch.float64, device=DEVICE),
    )
    scale = torch.tensor(7.0, dtype=torch.float64, device=DEVICE)
    leaves = [t.requires_grad_() for t in (image, text, scale)]
    s, own = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T, torch.arange(9, device=DEVICE)
    truth = _gradients((F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2, *leaves)
    for ours in (ClipLoss()(*leaves), beta_cal_ce_loss(image[:, None], text[:, None], scale)):
        for a, t in zip(_gradients(ours, *leaves), truth, strict=True):
            torch.testing.assert_close(a, t, rtol=1e-9, atol=1e-12)


def _gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_rejects():
    embeds = torch.ones(12, 8)
    with pytest.raises(ValueError, match=r"image_embeds: expected \(B, D\), got shape \(4, 3, 8\)"):
        ClipLoss()(torch.ones(4, 3, 8), torch.ones(4, 3, 8), 10.0)
    with pytest.raises(ValueError, match=r"text_embeds: expected shape \(12, 8\) as image_embeds, got \(5, 8\)"):
        ClipLoss()(embeds, embeds[:5], 10.0)
    with pytest.raises(ValueError, match="gather: expected a bool, 'auto', 'all_gather', 'ring', got 'star'"):
        ClipLoss(gather="star")
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'fast'"):
        ClipLoss(backend="fast")

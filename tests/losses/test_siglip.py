"""SigLIP's loss: against its formula, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from support.beta_cal import DEVICE, assert_equal, gradients
from support.precision import widest

from betaclip import SigLipLoss


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_equals_its_formula(backend):
    dtype = widest(backend)
    image, text = torch.randn(2, 9, 16, dtype=dtype, device=DEVICE)
    scale, bias = (torch.tensor(x, dtype=dtype, device=DEVICE) for x in (7.0, -3.0))
    leaves = [t.requires_grad_() for t in (image, text, scale, bias)]
    s = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias
    truth = -F.logsigmoid((2 * torch.eye(9, device=DEVICE) - 1) * s).sum() / 9
    assert_equal(gradients(SigLipLoss(backend)(*leaves), leaves), gradients(truth, leaves))


def test_without_bias():
    embeds = torch.eye(4)
    torch.testing.assert_close(SigLipLoss()(embeds, embeds, 10.0), SigLipLoss()(embeds, embeds, 10.0, torch.zeros(1)))


def test_rejects():
    embeds = torch.ones(12, 8)
    with pytest.raises(ValueError, match=r"image_embeds: expected \(B, D\), got shape \(4, 3, 8\)"):
        SigLipLoss()(torch.ones(4, 3, 8), torch.ones(4, 3, 8), 10.0)
    with pytest.raises(ValueError, match=r"text_embeds: expected shape \(12, 8\) as image_embeds, got \(5, 8\)"):
        SigLipLoss()(embeds, embeds[:5], 10.0)
    with pytest.raises(ValueError, match="logit_bias: expected a floating-point scalar"):
        SigLipLoss()(embeds, embeds, 10.0, torch.ones(2))
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'fast'"):
        SigLipLoss(backend="fast")

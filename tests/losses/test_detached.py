"""CLIP's loss over ranks that take what they gather for constants, against its formula in one process."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import needs_gloo, processes
from torch import Tensor

from betaclip import ClipLoss
from betaclip.losses.detached import detached_clip_loss
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

SIZES = (4, 0, 3)  # images per rank
VALID = torch.arange(sum(SIZES)) != 1  # the second image has no text


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    image, text = (torch.randn(sum(SIZES), 8, dtype=torch.float64) for _ in range(2))
    return image.requires_grad_(), (3 * text).requires_grad_(), torch.tensor(7.0, dtype=torch.float64).requires_grad_()


def formula() -> list[Tensor]:
    """The loss of the whole batch, and gradients of embeddings and scale: columns of the logits are constants."""
    image, text, scale = leaves()
    v, t = (F.normalize(e[VALID], dim=-1) for e in (image, text))
    own = torch.arange(len(v))
    loss = (F.cross_entropy(scale * v @ t.detach().T, own) + F.cross_entropy(scale * t @ v.detach().T, own)) / 2
    return [loss.detach(), *torch.autograd.grad(loss, (image, text, scale))]


def rank_equals_formula() -> None:
    group = ProcessGroup.of()
    begin = sum(SIZES[: group.rank])
    share = slice(begin, begin + SIZES[group.rank])
    image, text, scale = leaves()
    loss = detached_clip_loss(image[share], text[share], scale, group, mask=VALID[share])
    loss.backward()
    value, *gradients = formula()
    torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=0)
    for leaf, gradient in zip((image, text), gradients, strict=False):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[share] / group.size, gradient[share], rtol=1e-10, atol=1e-14)
    dist.all_reduce(scale.grad)
    torch.testing.assert_close(scale.grad / group.size, gradients[2], rtol=1e-10, atol=0)


@needs_gloo
def test_ranks_equal_formula(tmp_path):
    """Ranks with different numbers of images, one with none."""
    processes(len(SIZES), rank_equals_formula, tmp_path)


def test_value_is_that_of_clip_and_half_of_its_gradient_is_missing():
    image, text, scale = leaves()
    loss = detached_clip_loss(image, text, scale, SINGLE_PROCESS)
    whole = ClipLoss()(image, text, scale)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    ours, true = (torch.autograd.grad(one, (image, text, scale)) for one in (loss, whole))
    assert 0.4 < torch.cat(ours[:2]).norm() / torch.cat(true[:2]).norm() < 0.8
    torch.testing.assert_close(ours[2], true[2], rtol=1e-12, atol=0)  # the scale's gradient misses nothing


def test_one_image_and_none():
    """There are no negatives: the loss is 0, with finite gradients."""
    image, text, scale = leaves()
    for images in (1, 0):
        loss = detached_clip_loss(image[:images], text[:images], scale, SINGLE_PROCESS)
        gradients = torch.autograd.grad(loss, (image, text, scale))
        assert loss.item() == 0 and not any(gradient.any() for gradient in gradients)


def test_autocast():
    image, text, scale = (t.detach().float() for t in leaves())
    exact = detached_clip_loss(image, text, scale, SINGLE_PROCESS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = detached_clip_loss(image.bfloat16(), text, scale, SINGLE_PROCESS)
    assert rounded.dtype == torch.float32 and 0 < abs(rounded - exact) < 0.02 * exact


def test_norms_whose_squares_overflow():
    image, text, scale = (leaf.detach().float() for leaf in leaves())
    usual = detached_clip_loss(image, text, scale, SINGLE_PROCESS)
    torch.testing.assert_close(detached_clip_loss(1e20 * image, 1e30 * text, scale, SINGLE_PROCESS), usual)

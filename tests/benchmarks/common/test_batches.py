"""Synthetic batches are like those of training."""

import pytest
import torch
from common import batches

CPU = torch.device("cpu")


def test_synthetic_batches_look_like_training():
    batch = batches.synthetic_batch(64, 8, 512, torch.float32, CPU)
    v, t = (torch.nn.functional.normalize(x.detach(), dim=-1) for x in (batch.image, batch.text))
    cosines = torch.einsum("akd,bld->abkl", v, t)
    same_image = torch.eye(64).bool()[:, :, None, None].expand_as(cosines)
    own = same_image & torch.eye(8).bool()
    assert cosines[own].mean() == pytest.approx(0.45, abs=0.02)
    assert cosines[same_image & ~own].mean() == pytest.approx(0.2, abs=0.02)
    assert cosines[~same_image].mean() == pytest.approx(0.05, abs=0.02)
    assert batch.image.norm(dim=-1).std() > 0.1
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in batch.leaves)


def test_leaves():
    batch = batches.synthetic_batch(4, 3, 8, torch.float32, CPU)
    part = batch.to_leaves(torch.float64, slice(1, 3))
    assert torch.equal(part.image, batch.image.detach()[1:3].double())
    assert part.bias.item() == batches.SIGLIP_BIAS and len(part.leaves) == 4
    assert batch.to_leaves(torch.bfloat16).scale.dtype == torch.float32

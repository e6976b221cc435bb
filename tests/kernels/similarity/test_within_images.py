"""Cosines within images, and gradients of raw embeddings, however many images are taken at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.within_images import Images, cosines, inverse_norms, raw_gradients

B, K, D = 6, 5, 24


def layout(ragged: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Image ids of the rows, and slots; ragged: 4, 1, 5, 3, 5 and 2 rows."""
    if not ragged:
        return torch.arange(B, dtype=torch.int32).repeat_interleave(K), None
    counts = torch.tensor([4, 1, 5, 3, 5, 2])
    slots = torch.full((B, K), -1)
    slots[torch.arange(K) < counts[:, None]] = torch.arange(int(counts.sum()))
    return torch.arange(B, dtype=torch.int32).repeat_interleave(counts), slots


@pytest.mark.parametrize("chunk_elements", [None, 2 * K * D, 1])  # all images at a time, two, one
@pytest.mark.parametrize("dims", [(), (3, 17, D)])
@pytest.mark.parametrize("ragged", [False, True])
def test_matches_autograd(ragged, dims, chunk_elements):
    image_id, slots = layout(ragged)
    x, y = (torch.randn(len(image_id), D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    images = Images(B, K, slots, chunk_elements)
    inverse_norm = [inverse_norms(t.detach(), image_id, t.dtype)[0] for t in (x, y)]
    sides = [
        Operand(t.detach(), image_id, inverse, t.dtype, dims=dims)
        for t, inverse in zip((x, y), inverse_norm, strict=True)
    ]
    place = torch.arange(B * K).view(B, K) if slots is None else slots
    u, v = (F.normalize(t, dim=-1) for t in (x, y))
    empty = (place < 0)[..., None]
    prefixes = [[F.normalize(t[:, :dim], dim=-1)[place].masked_fill(empty, 0) for t in (x, y)] for dim in dims or (D,)]
    truth = torch.stack([a @ b.mT for a, b in prefixes])
    torch.testing.assert_close(cosines(*sides, images), truth.detach())
    dcosines = torch.randn(len(prefixes), B, K, K, dtype=torch.float64).masked_fill(empty | empty.mT, 0)
    du, dv = torch.randn_like(x), torch.randn_like(y)
    expected = torch.autograd.grad((truth * dcosines).sum() + 3 * (u * du).sum() + 3 * (v * dv).sum(), (x, y))
    gain = torch.tensor(3.0, dtype=torch.float64)
    given = du.clone(), dv.clone()
    gained = ((du, dv, dcosines, gain, False), (du.clone(), dv.clone(), dcosines, gain))
    for terms in (*gained, (3 * du, 3 * dv, dcosines)):
        ours = raw_gradients(*sides, images, *terms)
        torch.testing.assert_close(ours, expected)
    assert torch.equal(du, given[0]) and torch.equal(dv, given[1])
    with_units = [replace(side, unit=t.detach()) for side, t in zip(sides, (u, v), strict=True)]
    torch.testing.assert_close(cosines(*with_units, images), truth.detach())
    torch.testing.assert_close(raw_gradients(*with_units, images, 3 * du, 3 * dv, dcosines), expected)


def test_inverse_norms():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0], [torch.nan, 1.0], [3.0, 4.0]])
    inverse, complete = inverse_norms(x, torch.tensor([0, 1, 2, 3, -1], dtype=torch.int32), torch.float32)
    assert not complete
    torch.testing.assert_close(inverse, torch.tensor([0.2, 0.0, 0.0, torch.nan, 0.0]), equal_nan=True)

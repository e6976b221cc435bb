"""Scores of the pooling block: all pairs, chosen images, chosen texts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.largest import LargestTensor
from support.pooling import DEVICE, block, inputs, saved_bytes
from torch import Tensor

from betaclip import TextConditionedPool


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 9_000, 2**26])
def test_score_is_the_cosine_of_all_pairs(chunk_bytes, masked):
    """A pair at a time, some texts of one image, and several images at once."""
    pool, (patches, _) = block(), inputs(b=4)
    texts = torch.randn(7, 16, dtype=torch.float64, device=DEVICE)
    mask = torch.rand(4, 7, device=DEVICE) < 0.7 if masked else None
    if mask is not None:
        mask[3] = False

    def score(patches: Tensor, texts: Tensor) -> Tensor:
        return pool.score(patches, texts, patch_mask=mask, chunk_bytes=chunk_bytes)

    def plain(patches: Tensor, texts: Tensor) -> Tensor:
        return F.cosine_similarity(pool(patches, texts, patch_mask=mask), texts, dim=-1)

    leaves = [patches.requires_grad_(), texts.requires_grad_()]
    weight = torch.randn(4, 7, dtype=torch.float64, device=DEVICE)
    ours, truth = score(*leaves), plain(*leaves)
    assert ours.shape == (4, 7)
    torch.testing.assert_close(ours, truth)
    wanted = [*leaves, *(p for name, p in pool.named_parameters() if name != "logit_scale")]
    for a, b in zip(*(torch.autograd.grad(x, wanted, weight) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(score(*leaves), truth)


def test_score_in_bounded_memory():
    """Never a (B, M, D) tensor, forward or backward."""
    pool, (patches, _) = block(), inputs(b=16, p=5)
    texts = torch.randn(64, 16, dtype=torch.float64, device=DEVICE).requires_grad_()
    pairs = 16 * 64 * 16
    with LargestTensor() as largest:
        pool.score(patches, texts, chunk_bytes=2**16).sum().backward()
    # At most the hidden layer of one chunk's pairs.
    assert max(16 * 64, texts.numel()) < largest.numel <= pairs / 4
    assert (
        saved_bytes(lambda: pool.score(patches, texts, chunk_bytes=2**16)) < 8 * pairs
    )  # nor does the backward keep any


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 30_000, 2**26])
@pytest.mark.parametrize("backend", ["folded", "sdpa"])
def test_score_of_chosen_images(backend, chunk_bytes, masked):
    """Equal to those entries of all pairs, in value and every gradient; one image is never chosen, one often."""
    pool, (patches, _) = block(backend=backend), inputs(b=5)
    texts = torch.randn(7, 16, dtype=torch.float64, device=DEVICE)
    images = torch.randint(4, (7, 3), device=DEVICE)
    images[:, 1] = 0
    patch_mask = torch.rand(5, 7, device=DEVICE) < 0.7 if masked else None
    query_mask = torch.arange(7, device=DEVICE) != 2 if masked else None
    if patch_mask is not None:
        patch_mask[3] = False
        texts[2] = torch.nan
    leaves = [patches.requires_grad_(), texts.requires_grad_()]
    options = {"patch_mask": patch_mask, "query_mask": query_mask}
    ours = pool.score(*leaves, images=images, **options, chunk_bytes=chunk_bytes)
    truth = pool.score(*leaves, **options).T.gather(1, images)
    torch.testing.assert_close(ours, truth)
    assert not masked or not ours[2].any()
    weight = torch.randn(7, 3, dtype=torch.float64, device=DEVICE)
    wanted = [*leaves, *(p for name, p in pool.named_parameters() if name != "logit_scale")]
    for a, b in zip(*(torch.autograd.grad(x, wanted, weight) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


def test_gradcheck_of_chosen_scores():
    pool, (patches, queries) = block(), inputs(b=3, k=2, p=2)
    leaves = [t.requires_grad_() for t in (patches, queries[0])]
    images = torch.tensor([[0, 2], [2, 2]])
    assert torch.autograd.gradcheck(lambda x, t: pool.score(x, t, images=images, chunk_bytes=9_000), leaves)


def test_chosen_scores_project_an_image_once(monkeypatch):
    """Its patches are in one call, with all its texts, and no call has an image that nobody chose."""
    pool, (patches, queries) = block(), inputs(b=6, k=8)
    calls = []

    def attend(operands: Any, patch_mask: Tensor | None) -> Tensor:
        calls.append((operands.patches, operands.queries.shape))
        return TextConditionedPool._attention(pool, operands, patch_mask)

    monkeypatch.setattr(pool, "_attention", attend)
    images = (torch.arange(8)[:, None] + torch.tensor([0, 1])) % 4
    with torch.no_grad():
        pool.score(patches, queries[0], images=images)
        assert [shape for _, shape in calls] == [(4, 4, 16)]
        torch.testing.assert_close(calls.pop()[0], patches[:4])
        pool.score(patches, queries[0], images=images, chunk_bytes=3 * (4 * 7 * 16 + 4 * 352) * 8)
    assert [shape for _, shape in calls] == [(3, 4, 16), (1, 4, 16)]


def test_chosen_scores_in_bounded_memory():
    """Neither all pairs nor the (M, J, D) embeddings of those that are chosen."""
    pool, (patches, _) = block(), inputs(b=16, p=5)
    texts = torch.randn(64, 16, dtype=torch.float64, device=DEVICE).requires_grad_()
    images = torch.randint(16, (64, 20))
    pairs = images.numel() * 16
    with LargestTensor() as largest:
        pool.score(patches, texts, images=images, chunk_bytes=2**15).sum().backward()
    assert texts.numel() <= largest.numel <= pairs / 4
    saved = saved_bytes(lambda: pool.score(patches, texts, images=images, chunk_bytes=2**15))
    assert saved < 8 * pairs / 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 30_000, 2**26])
def test_score_of_chosen_texts(chunk_bytes, masked):
    """Equal to those entries of all pairs, in value and every gradient; a text may come twice, or there may be none."""
    pool, (patches, _) = block(backend="folded"), inputs(b=5)
    texts = torch.randn(7, 16, dtype=torch.float64, device=DEVICE)
    chosen = torch.randint(1, 7, (5, 4), device=DEVICE)
    chosen[:, 1] = chosen[:, 0]
    chosen[2, 3] = -1
    patch_mask = torch.rand(5, 7, device=DEVICE) < 0.7 if masked else None
    query_mask = torch.arange(7, device=DEVICE) != 2 if masked else None
    if patch_mask is not None:
        patch_mask[3] = False
        texts[2] = torch.nan
        chosen[0, 2] = 2
    leaves = [patches.requires_grad_(), texts.requires_grad_()]
    options = {"patch_mask": patch_mask, "query_mask": query_mask}
    ours = pool.score(*leaves, texts=chosen, **options, chunk_bytes=chunk_bytes)
    truth = pool.score(*leaves, **options).gather(1, chosen.clamp_min(0)).masked_fill(chosen < 0, 0)
    torch.testing.assert_close(ours, truth)
    assert ours[2, 3] == 0 and (not masked or ours[0, 2] == 0)
    weight = torch.randn(5, 4, dtype=torch.float64, device=DEVICE)
    wanted = [*leaves, *(p for name, p in pool.named_parameters() if name != "logit_scale")]
    for a, b in zip(*(torch.autograd.grad(x, wanted, weight) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


def test_scores_of_chosen_texts_in_bounded_memory():
    """Not the (B, Q, D) embeddings of all chosen pairs."""
    pool, (patches, _) = block(), inputs(b=16, p=5)
    texts = torch.randn(64, 16, dtype=torch.float64, device=DEVICE).requires_grad_()
    chosen = torch.randint(64, (16, 80), device=DEVICE)
    pairs = chosen.numel() * 16
    with LargestTensor() as largest:
        pool.score(patches, texts, texts=chosen, chunk_bytes=2**15).sum().backward()
    assert texts.numel() <= largest.numel <= pairs / 4
    assert saved_bytes(lambda: pool.score(patches, texts, texts=chosen, chunk_bytes=2**15)) < 8 * pairs / 2


def test_score_of_masked_texts():
    pool, (patches, queries) = block(), inputs()
    mask = torch.tensor([True, False, True, True, False], device=DEVICE)
    texts = queries[0].masked_fill(~mask[:, None], torch.nan).requires_grad_()
    scores = pool.score(patches, texts, query_mask=mask)
    torch.testing.assert_close(scores[:, mask], pool.score(patches, queries[0][mask]))
    assert not scores[:, ~mask].any()
    (gradient,) = torch.autograd.grad(scores.square().sum(), texts)
    assert gradient.isfinite().all() and not gradient[~mask].any() and gradient[mask].all()
    images = torch.zeros(5, 2, dtype=torch.int64)
    nothing = pool.score(patches, texts, images=images, query_mask=torch.zeros_like(mask))
    assert nothing.shape == (5, 2) and not nothing.any()
    assert not torch.autograd.grad(nothing.sum(), texts)[0].any()


def test_score_of_nothing():
    pool, (patches, queries) = block(), inputs()
    assert pool.score(patches, queries[0], images=torch.zeros(5, 0, dtype=torch.int64)).shape == (5, 0)
    assert pool.score(patches, queries[0, :0], images=torch.zeros(0, 3, dtype=torch.int32)).shape == (0, 3)
    assert pool.score(patches, queries[0, :0]).shape == (3, 0)
    assert pool.score(patches[:0], queries[0]).shape == (0, 5)
    none = torch.zeros(3, 0, dtype=torch.int64, device=DEVICE)
    assert pool.score(patches, queries[0], texts=none).shape == (3, 0)
    assert pool.score(patches[:0], queries[0, :0], texts=none[:0].view(0, 4)[:, :2]).shape == (0, 2)


def test_rejects_heads_and_scores():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim = 12, got 8"):
        TextConditionedPool(12)
    with pytest.raises(ValueError, match=r"mlp_ratio: expected at least 1 / embed_dim = 1 / 16, or 0 .*, got 0\.05"):
        TextConditionedPool(16, mlp_ratio=0.05)
    with pytest.raises(ValueError, match="norm_qkv: expected False with norm_inputs"):
        TextConditionedPool(16, norm_inputs=True, norm_qkv=True)
    with pytest.raises(ValueError, match=r"queries: expected \(M, D\), got shape \(2, 6, 8\)"):
        TextConditionedPool(8, 2).score(torch.ones(2, 5, 8), torch.ones(2, 6, 8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"images": torch.zeros(6, 2)}, r"images: expected integers of shape \(6, J\), got torch.float32 \(6, 2\)"),
        ({"images": torch.zeros(6).long()}, r"images: expected integers of shape \(6, J\), got torch.int64 \(6,\)"),
        ({"images": torch.zeros(5, 2).long()}, r"images: expected integers of shape \(6, J\), got .* \(5, 2\)"),
        ({"images": torch.full((6, 2), 2)}, "images: expected numbers from 0 to 1, got 2 to 2"),
        ({"images": torch.arange(-1, 5)[:, None]}, "images: expected numbers from 0 to 1, got -1 to 4"),
        (
            {"query_mask": torch.ones(2, 6) > 0},
            r"query_mask: expected bool of shape \(6,\), .* got torch.bool \(2, 6\)",
        ),
        ({"texts": torch.zeros(2, 3)}, r"texts: expected integers of shape \(2, Q\), got torch.float32 \(2, 3\)"),
        ({"texts": torch.zeros(6, 3).long()}, r"texts: expected integers of shape \(2, Q\), got torch.int64 \(6, 3\)"),
        ({"texts": torch.full((2, 3), 6)}, "texts: expected numbers up to 5, or below 0 for none, got 6"),
        ({"texts": torch.zeros(2, 3, device="meta").long()}, "texts: expected device cpu as for patches, got meta"),
        ({"texts": torch.zeros(2, 3).long(), "images": torch.zeros(6, 2).long()}, "texts: expected None with images"),
        ({"query_mask": torch.ones(6)}, r"query_mask: expected bool of shape \(6,\), True = valid, got torch.float32"),
        ({"query_mask": (torch.ones(6) > 0).to("meta")}, "query_mask: expected device cpu as for queries, got meta"),
    ],
)
def test_score_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        TextConditionedPool(8, 2).score(torch.ones(2, 5, 8), torch.ones(6, 8), **options)

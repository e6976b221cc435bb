"""Plans of chosen pairs: every pair has one slot, of its image and text, and chunks keep to their budget."""

import pytest
import torch

from betaclip.pair_chunks import Budget, PairChunks, plan_pairs


def slots(plan: PairChunks) -> list[tuple[int, int]]:
    """The image and text of each slot, chunk after chunk."""
    found, first = [], 0
    for size, pieces in zip(plan.sizes, plan.texts, strict=True):
        for piece in pieces:
            assert len(piece) == size
            for image, texts in zip(plan.used[first : first + size].tolist(), piece.tolist(), strict=True):
                found += [(image, text) for text in texts]
        first += size
    assert first == len(plan.used)
    return found


@pytest.mark.parametrize("chunk", [1, 60, 200, 10**6])
@pytest.mark.parametrize("kind", ["balanced", "random", "skewed", "one image"])
def test_every_pair_has_its_slot(kind, chunk):
    budget = Budget(chunk, pair=10, image=25)
    images, (texts, others) = 9, (7, 4)
    chosen = {
        "balanced": (torch.arange(texts)[:, None] + torch.arange(others)) % texts,
        "random": torch.randint(images, (texts, others)),
        "skewed": torch.tensor([[0, 0, 8, 8]]).repeat(texts, 1) + torch.arange(texts)[:, None] // 6,
        "one image": torch.full((texts, others), 5),
    }[kind].clamp_max(images - 1)
    plan = plan_pairs(chosen, images, None, budget)
    found = slots(plan)
    for text in range(texts):
        assert [found[slot] for slot in plan.place[text]] == [(image, text) for image in chosen[text].tolist()]
    assert plan.place.unique().numel() == chosen.numel()
    assert len(found) <= 2 * chosen.numel()
    assert plan.used.tolist() == chosen.unique().tolist()
    for size, pieces in zip(plan.sizes, plan.texts, strict=True):
        assert all(size == piece.shape[1] == 1 or size * (25 + 10 * piece.shape[1]) <= chunk for piece in pieces)
    if chunk == 10**6 and kind != "skewed":
        assert len(plan.sizes) == 1  # no image of it is in a second chunk
    if kind == "one image":
        assert len(plan.sizes) == 1


def test_texts_that_are_left_out():
    chosen, valid = torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.tensor([True, False, True])
    plan = plan_pairs(chosen, 5, valid, Budget(10**6, 1, 1))
    found = slots(plan)
    assert plan.used.tolist() == [0, 1, 3]
    assert plan.place[1].tolist() == [len(found)] * 2
    assert [found[slot] for slot in plan.place[[0, 2]].flatten()] == [(0, 0), (1, 0), (3, 2), (0, 2)]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_no_pair(shape):
    plan = plan_pairs(torch.zeros(shape, dtype=torch.int64), 5, None, Budget(10, 1, 1))
    assert not plan.sizes and not plan.texts and len(plan.used) == 0 and plan.place.shape == shape
    nothing_valid = plan_pairs(torch.zeros(2, 3, dtype=torch.int64), 5, torch.zeros(2) > 0, Budget(10, 1, 1))
    assert nothing_valid.place.tolist() == [[0, 0, 0]] * 2

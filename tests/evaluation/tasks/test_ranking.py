"""Ranks against their definition by loops."""

import math

import pytest
import torch
from torch import Tensor

from betaclip.evaluation.tasks.ranking import cosines, recalls, retrieval_ranks


def ranks_by_loops(scores: Tensor, image_of_text: Tensor) -> tuple[list[int], list[int]]:
    """Ranks from (images, texts) scores; NaN is the best score for a wrong candidate, the worst for the right one."""
    images, texts = scores.shape

    def wrong(i: int, j: int) -> float:
        return math.inf if scores[i, j].isnan() else float(scores[i, j])

    def right(i: int, j: int) -> float:
        return -math.inf if scores[i, j].isnan() else float(scores[i, j])

    of_texts = []
    for j in range(texts):
        own = int(image_of_text[j])
        of_texts.append(1 + sum(wrong(i, j) >= right(own, j) for i in range(images) if i != own))
    of_images = []
    for i in range(images):
        best = max(right(i, j) for j in range(texts) if image_of_text[j] == i)
        of_images.append(1 + sum(wrong(i, j) >= best for j in range(texts) if image_of_text[j] != i))
    return of_texts, of_images


@pytest.mark.parametrize("images, texts", [(8, 8), (7, 19), (1, 3), (13, 13)])
@pytest.mark.parametrize("pairs", [1, 30, 2**22])
def test_ranks_match_loops(images, texts, pairs):
    """Few distinct scores, so that many tie; NaN and infinities; texts in any order; blocks of any size."""
    for case in range(5):
        scores = torch.randint(0, 4, (images, texts)).float()
        if case:
            kinds = torch.rand(images, texts)
            scores[kinds < 0.1] = torch.nan
            scores[kinds > 0.9] = torch.inf
            scores[(kinds > 0.8) & (kinds < 0.9)] = -torch.inf
        extra = torch.randint(0, images, (texts - images,)) if texts > images else torch.empty(0, dtype=torch.int64)
        image_of_text = torch.cat((torch.arange(images), extra))[torch.randperm(texts)]
        ours = retrieval_ranks(lambda lo, hi, scores=scores: scores[lo:hi], images, image_of_text, max_pairs=pairs)
        assert [ranks.tolist() for ranks in ours] == list(ranks_by_loops(scores, image_of_text))


def test_recalls():
    """From text to image the ranks are 1, 2, 6, 11 and for the others the worst, 12."""
    scores = torch.eye(12)
    for text, rank in enumerate([1, 2, 6, 11, *[12] * 8]):
        others = [i for i in range(12) if i != text]
        scores[others[: rank - 1], text] = 2
    found = recalls(lambda lo, hi: scores[lo:hi], 12, torch.arange(12))
    assert [found[f"t2i_r{k}"] for k in (1, 5, 10)] == [1 / 12, 2 / 12, 3 / 12]
    truth = torch.tensor(ranks_by_loops(scores, torch.arange(12))[1])
    assert [found[f"i2t_r{k}"] for k in (1, 5, 10)] == [float((truth <= k).double().mean()) for k in (1, 5, 10)]
    assert truth.unique().numel() > 3


@pytest.mark.parametrize("pairs", [7, 40, 2**22])
def test_equal_embeddings_are_ranked_last(pairs):
    """A collapsed model retrieves nothing, wherever its pairs stand in a block."""
    for count in range(11, 20):
        image, text = torch.randn(2, 1, 64)
        scores = cosines(image.expand(count, -1), text.expand(count + 1, -1))
        found = recalls(scores, count, torch.arange(count + 1).clamp_max(count - 1), max_pairs=pairs)
        assert set(found.values()) == {0.0}


def test_ranks_reject():
    def scores(lo: int, hi: int) -> Tensor:
        return torch.zeros(hi - lo, 2)

    for image_of_text in ([0, 0], [1, 2], [0, 3]):
        with pytest.raises(ValueError, match=r"image_of_text: expected every number below 2"):
            retrieval_ranks(scores, 2, torch.tensor(image_of_text))

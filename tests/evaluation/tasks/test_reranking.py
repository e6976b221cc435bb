"""Re-ranking against its definition by loops."""

import math

import pytest
import torch
from PIL import Image
from support import colours
from torch import Tensor

from betaclip.evaluation.encode import Squash, encode_texts
from betaclip.evaluation.tasks import reranking
from betaclip.evaluation.tasks.ranking import cosines, retrieval_ranks
from betaclip.evaluation.tasks.reranking import reranked_ranks
from betaclip.evaluation.tasks.retrieval import retrieval
from betaclip.model.tokenizer import Tokenizer

IMAGES, TEXTS = 9, 17
WORDS = ["red", "green", "blue", "red green", "blue red red", "green blue", "blue green green", "red blue", "nothing"]


def encoded() -> tuple[colours.ColourModel, Tensor, Tensor, Tensor, Tensor]:
    """A model, pictures, the embeddings of pictures and texts, and the image of each text."""
    model = colours.ColourModel(sharpness=5).eval()
    pictures = torch.stack([Squash(32)(Image.fromarray(colours.noise(i))) for i in range(IMAGES)])
    image_of_text = torch.arange(TEXTS) % IMAGES
    with torch.no_grad():
        texts = encode_texts(model, Tokenizer(), [WORDS[i % 8] + " red" * (i // 8) for i in range(TEXTS)], 8)
        image_embeds, _ = model.encode_image(pictures)
    return model, pictures, image_embeds, texts, image_of_text


def ranks_by_loops(cls: Tensor, pooled: Tensor, image_of_text: Tensor, top_k: int) -> tuple[list[int], list[int]]:
    """From (images, texts) scores by CLS and by pooling."""

    def order(near: Tensor, scores: Tensor, own: list[int]) -> int:
        least = sorted(near.tolist(), reverse=True)[min(top_k, len(near)) - 1]
        values = scores.masked_fill(near < least, -math.inf).tolist()
        best = max(values[i] for i in own)
        return 1 + sum(value >= best for i, value in enumerate(values) if i not in own)

    images, texts = cls.shape
    of_images = [[j for j in range(texts) if image_of_text[j] == i] for i in range(images)]
    return (
        [order(cls[:, j], pooled[:, j], [int(image_of_text[j])]) for j in range(texts)],
        [order(cls[i], pooled[i], of_images[i]) for i in range(images)],
    )


@pytest.mark.parametrize("top_k", [1, 3, 8, 100])
@pytest.mark.parametrize("at_a_time", [2, 256])
def test_matches_loops(top_k, at_a_time, monkeypatch):
    monkeypatch.setattr(reranking, "MAX_TEXTS", at_a_time)
    monkeypatch.setattr(reranking, "MAX_PAIRS", 4 * TEXTS)
    model, pictures, image_embeds, texts, image_of_text = encoded()
    by_cls = cosines(image_embeds, texts)
    with torch.no_grad():
        _, patches = model.encode_image(pictures)
        queries = texts.expand(IMAGES, -1, -1)
        pooled = reranking.cosines_of_pairs(model.pool(patches, queries), queries)
        found = reranked_ranks(model, model.pool, by_cls, pictures.split(4), texts, image_of_text, IMAGES, top_k)
    assert [ranks.tolist() for ranks in found] == list(ranks_by_loops(by_cls(0, 9), pooled, image_of_text, top_k))
    every = retrieval_ranks(lambda lo, hi: pooled[lo:hi], IMAGES, image_of_text)
    assert all(map(torch.equal, found, every)) == (top_k == 100)


def test_only_the_nearest_are_pooled(monkeypatch):
    model, pictures, image_embeds, texts, image_of_text = encoded()
    pooled, pool = [], model.pool.forward
    monkeypatch.setattr(model.pool, "forward", lambda patches, queries: pooled.append(queries.shape[:2].numel())
                        or pool(patches, queries))  # fmt: skip
    with torch.no_grad():
        reranked_ranks(
            model, model.pool, cosines(image_embeds, texts), pictures.split(1), texts, image_of_text, IMAGES, 1
        )
    assert IMAGES <= sum(pooled) <= IMAGES + TEXTS < IMAGES * TEXTS


def test_a_collapsed_model_retrieves_nothing():
    model = colours.ColourModel()
    pictures = [(colours.picture({(0, 0): "red"}), ["red"]) for _ in range(12)]
    found = retrieval(model, Tokenizer(), pictures, Squash(32), conditioned=False, top_k=10, batch_size=5)
    assert {value for name, value in found.items() if "_r" in name} == {0.0}
    assert "conditioned_top10_t2i_r1" in found


def test_a_picture_that_is_gone_is_not_found():
    """It is read a second time, and may have disappeared."""
    model, pictures, image_embeds, texts, image_of_text = encoded()
    again = [[*pictures[:4]], [None, *pictures[5:]]]
    with torch.no_grad():
        found, _ = reranked_ranks(
            model, model.pool, cosines(image_embeds, texts), again, texts, image_of_text, IMAGES, IMAGES
        )
    assert found[image_of_text == 4].tolist() == [IMAGES, IMAGES]

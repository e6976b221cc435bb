"""Ranks against their definition by loops, and recalls of a model whose right answers are known."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support import colours
from support.ranks import needs_gloo, processes
from torch import Tensor

from betaclip.data.transforms import EvaluationTransform
from betaclip.evaluation.encode import NoPicturesError, Squash
from betaclip.evaluation.tasks.retrieval import cosines, recalls, retrieval, retrieval_ranks, texts_of_pictures
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup


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


def test_texts_of_pictures(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert texts_of_pictures([(a, "1"), (b, "2"), (a, "3")]) == [(a, ["1", "3"]), (b, ["2"])]


def three_pictures() -> list[npt.NDArray[np.uint8]]:
    """The mean of the patches is the same in the first two."""
    left = colours.picture({(r, c): "red" if c < 2 else "green" for r in range(4) for c in range(4)})
    right = colours.picture({(r, c): "green" if c < 2 else "red" for r in range(4) for c in range(4)})
    return [left, right, colours.picture({(0, 0): "blue"})]


def test_by_known_model():
    model, tokenizer = colours.ColourModel(), Tokenizer()
    red, blue = colours.picture({(0, 0): "red"}), colours.picture({(3, 1): "blue", (0, 1): "green"})
    pictures = [(red, ["a red square", "green"]), (blue, ["blue green"])]
    found = retrieval(model, tokenizer, pictures, Squash(32), conditioned=True, batch_size=2)
    # "green" is said of the first and seen in the second, which is nearest to "blue green".
    assert found["t2i_r1"] == 2 / 3 and found["t2i_r5"] == 1
    assert found["i2t_r1"] == 1
    assert (found["images"], found["texts"], found["left_out"]) == (2, 3, 0)


def test_conditioned_is_not_cls():
    """All pairs are scored, not only each picture with its own text."""
    model, tokenizer = colours.ColourModel(), Tokenizer()
    small = colours.picture({(0, 0): "red"} | {(r, c): "green" for r in (1, 2, 3) for c in range(4)})
    other = colours.picture({(0, 0): "blue"} | {(r, c): "green" for r in (1, 2, 3) for c in range(4)})
    none = colours.picture({(0, 0): "green"})
    pictures = [(small, ["red"]), (other, ["blue"]), (none, ["green"])]
    found = retrieval(model, tokenizer, pictures, Squash(32), conditioned=True, batch_size=2)
    assert found["conditioned_i2t_r1"] == 1 / 3  # pooled by "green", each of them is as green as the third
    assert found["i2t_r1"] == 1 / 3 and found["t2i_r1"] == 1
    assert found["conditioned_t2i_r1"] == 2 / 3
    assert "conditioned_t2i_r1" not in retrieval(
        model, tokenizer, pictures, Squash(32), conditioned=False, batch_size=2
    )


def test_pictures_that_cannot_be_read(tmp_path, caplog):
    """They and their texts are left out, and the others are retrieved as if they had never been there."""
    files = [colours.save(tmp_path / f"{n}.png", image) for n, image in enumerate(three_pictures())]
    broken, missing = colours.save_broken(tmp_path / "broken.png"), tmp_path / "missing.png"
    texts = [["red green"], ["green", "green red"], ["blue"]]
    good = list(zip(files, texts, strict=True))
    bad = [(broken, ["blue", "red"]), *good[:2], (missing, ["blue"]), good[2], (broken, ["red"])]
    options = {"conditioned": True, "batch_size": 2}
    model, transform = colours.ColourModel(), EvaluationTransform(32)
    truth = retrieval(model, Tokenizer(), good, transform, **options)
    found = retrieval(model, Tokenizer(), bad, transform, **options)
    assert found == truth | {"left_out": 3}
    assert truth["i2t_r1"] < 1 and truth["texts"] == 4
    assert str(missing) in caplog.text and f"left out {broken}: OSError" in caplog.text
    with pytest.raises(NoPicturesError, match="none of 2 pictures"):
        retrieval(model, Tokenizer(), [bad[0], bad[3]], transform, **options)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_change_nothing(batch_size):
    model = colours.ColourModel(sharpness=3)
    noise = [np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8) for i in range(5)]
    words = ["red", "red green", "blue blue red", "green blue", "blue"]
    pictures = [(image, [text]) for image, text in zip(noise, words, strict=True)]
    found = retrieval(model, Tokenizer(), pictures, Squash(32), conditioned=True, batch_size=batch_size)
    assert model.images == 5 and model.texts == 5
    truth = retrieval(model, Tokenizer(), pictures, Squash(32), conditioned=True, batch_size=3)
    assert found == truth and found["images"] == 5


def ranks_equal_one_process(folder: Path) -> None:
    places_equal_one_process()
    names = ["red", "green blue", "blue", "red green", "blue blue red", "green", "red blue green green"]
    pictures = [(folder / f"{i}.png", [name, *names[: i % 3]]) for i, name in enumerate(names)]
    model, transform = colours.ColourModel(sharpness=5), EvaluationTransform(32)
    together, alone = (
        retrieval(model, Tokenizer(), pictures, transform, conditioned=True, batch_size=2, process_group=group)
        for group in (ProcessGroup.of(), SINGLE_PROCESS)
    )
    assert together == pytest.approx(alone, abs=1e-12)
    assert 0 < alone["t2i_r1"] < 1 and alone["left_out"] == 2


def places_equal_one_process() -> None:
    """Scores with ties and NaN; the second of three processes has no images."""
    group, sizes = ProcessGroup.of(), (4, 0, 3)
    scores = torch.randint(0, 4, (7, 15)).float()
    scores[torch.rand(7, 15) < 0.1] = torch.nan
    image_of_text = torch.cat((torch.arange(7), torch.randint(0, 7, (8,))))[torch.randperm(15)]
    before, own = sum(sizes[: group.rank]), sizes[group.rank]
    text_to_image, image_to_text = retrieval_ranks(
        lambda lo, hi: scores[before + lo : before + hi], own, image_of_text, group
    )
    truth = retrieval_ranks(lambda lo, hi: scores[lo:hi], 7, image_of_text)
    assert torch.equal(text_to_image, truth[0]) and torch.equal(image_to_text, truth[1][before : before + own])


@needs_gloo
def test_ranks_equal_one_process(tmp_path):
    """With shares of unequal sizes and pictures that cannot be read."""
    colours.save_seven(tmp_path)
    processes(3, ranks_equal_one_process, tmp_path, tmp_path)

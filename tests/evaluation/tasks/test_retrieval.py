"""Recalls of a model whose right answers are known."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support import colours
from support.ranks import needs_gloo, processes

from betaclip.data.transforms import EvaluationTransform
from betaclip.evaluation.encode import NoPicturesError, Squash
from betaclip.evaluation.tasks.ranking import retrieval_ranks
from betaclip.evaluation.tasks.retrieval import retrieval, texts_of_pictures
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup


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
    options = {"conditioned": True, "own_text": True, "top_k": 2, "batch_size": 2}
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


def test_own_text():
    """All texts are compared with what a picture's own first text pools from it."""
    both, blue = colours.picture({(0, 0): "red", (3, 3): "green"}), colours.picture({(0, 0): "blue"})
    options = {"conditioned": True, "batch_size": 2}
    for texts, share in ((["red", "red red", "green"], 3 / 4), (["green", "red red", "red"], 2 / 4)):
        pictures = [(both, texts), (blue, ["blue"])]
        found = retrieval(colours.ColourModel(), Tokenizer(), pictures, Squash(32), own_text=True, **options)
        # Pooled by "red", the first picture is red alone, and "green" does not find it, which all pairs do.
        assert (found["conditioned_own_text_t2i_r1"], found["conditioned_t2i_r1"]) == (share, 1)
        assert found["conditioned_own_text_i2t_r1"] == 1
        without = retrieval(colours.ColourModel(), Tokenizer(), pictures, Squash(32), **options)
        assert without == {name: value for name, value in found.items() if "own_text" not in name}


def ranks_equal_one_process(folder: Path) -> None:
    places_equal_one_process()
    names = ["red", "green blue", "blue", "red green", "blue blue red", "green", "red blue green green"]
    pictures = [(folder / f"{i}.png", [name, *names[: i % 3]]) for i, name in enumerate(names)]
    model, transform = colours.ColourModel(sharpness=5), EvaluationTransform(32)
    together, alone = (
        retrieval(
            model, Tokenizer(), pictures, transform,
            conditioned=True, own_text=True, top_k=2, batch_size=2, process_group=group,
        )
        for group in (ProcessGroup.of(), SINGLE_PROCESS)
    )  # fmt: skip
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

"""Accuracies of a model whose right answers are known."""

from pathlib import Path

import pytest
import torch
from support import colours
from support.ranks import needs_gloo, processes

from betaclip.data.multiple_choice import Choice
from betaclip.evaluation.encode import NoPicturesError
from betaclip.evaluation.tasks.multiple_choice import (
    choice_accuracy,
    choose,
    cosines_of_pairs,
    first_is_best,
    wrong_answers,
)
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

NAN, INF = torch.nan, torch.inf


def test_first_is_best():
    rows = [
        ([3, 2, 1], [1, 1, 1], True),
        ([2, 3, 1], [1, 1, 1], False),
        ([2, 1, 2], [1, 1, 1], False),  # a tie is wrong
        ([2, 1, 2], [1, 1, 0], True),  # a tie with an empty slot does not count
        ([2, 1, NAN], [1, 1, 0], True),
        ([2, 1, NAN], [1, 1, 1], False),
        ([NAN, 1, 2], [1, 1, 1], False),
        ([-INF, -INF, 0], [1, 1, 0], False),
        ([0.1, -INF, 0], [1, 1, 1], True),
    ]
    scores, valid, truth = (torch.tensor(list(column)) for column in zip(*rows, strict=True))
    assert first_is_best(scores, valid.bool()).tolist() == truth.tolist()


def test_equal_embeddings_tie():
    """Their positions do not matter."""
    same = torch.randn(67)
    texts = torch.cat((same.expand(6, -1), torch.randn(1, 67))).expand(5, -1, -1)
    scores = cosines_of_pairs(torch.randn(5, 1, 67), texts)
    assert all(len(row[:6].unique()) == 1 and len(row.unique()) == 2 for row in scores)


def test_choose_by_region_and_by_pooling():
    """A red and a green square; both names are found in the whole picture, only one in each box."""
    model = colours.ColourModel().eval()
    image = colours.picture({(0, 1): "red", (2, 3): "green"})
    patches = torch.zeros(1, 16, 4)
    for (row, column), colour in {(0, 1): 0, (2, 3): 1}.items():
        patches[0, 4 * row + column, colour] = 1
    assert image[0:8, 8:16, 0].all()
    red, green, blue = torch.eye(4)[:3]
    texts = torch.stack([torch.stack(some) for some in ((red, green), (red, green), (red, blue), (green, red))])
    boxes = torch.tensor([[1, 0, 2, 1], [3, 2, 4, 3], [3, 2, 4, 3], [3, 2, 4, 3]]).float()
    with torch.no_grad():
        right = choose(model, patches, torch.zeros(4, dtype=torch.int64), boxes, texts, torch.ones(4, 2).bool())
    assert right[0].tolist() == [True, False, False, True]
    assert right[1].tolist() == [False, False, True, False]


def questions(tmp_path) -> list[tuple[str, Choice]]:
    """On a wide picture in a file and a small one in memory: hard ones, 3 of 4 right, and easy ones, both right."""
    wide = {(0, 1): "red", (2, 3): "green", (3, 0): "blue"}
    file = colours.save(tmp_path / "wide.png", colours.picture(wide, width=160, height=64))
    small = colours.picture({(1, 1): "blue"})

    def box(row: int, column: int) -> tuple[int, int, int, int]:
        return colours.box_of(row, column, 160, 64)

    return [
        ("hard", Choice(file, box(0, 1), "a red square", ("a green square",))),
        ("easy", Choice(file, box(2, 3), "green", ("blue", "red", "red blue"))),
        ("hard", Choice(file, box(3, 0), "blue", ("green", "red"))),
        ("hard", Choice(file, box(3, 0), "green", ("blue",))),
        ("easy", Choice(small, colours.box_of(1, 1), "blue", ("red",))),
        ("hard", Choice(small, colours.box_of(1, 1), "blue", ("green", "red", "green red"))),
    ]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_wrong_answers(tmp_path, batch_size):
    """The wrong ones of those that can be read, each with the best negative."""
    blue = colours.box_of(3, 0, 160, 64)
    choices = [choice for _, choice in questions(tmp_path)]
    choices += [Choice(choices[0].image, blue, "green", ("red", "blue", "blue red")),
                Choice(colours.save_broken(tmp_path / "broken.png"), blue, "green", ("blue",))]  # fmt: skip
    found = list(wrong_answers(colours.ColourModel().eval(), Tokenizer(), choices, batch_size=batch_size))
    assert found == [(3, "blue"), (6, "blue")]
    some = wrong_answers(colours.ColourModel().eval(), Tokenizer(), choices, batch_size=1)
    assert next(some) == (3, "blue")


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_accuracy(tmp_path, batch_size):
    """Boxes are in pixels of the file, whose shape differs from the model's square."""
    model = colours.ColourModel()
    found = choice_accuracy(model, Tokenizer(), questions(tmp_path), batch_size=batch_size)
    assert found["hard"] == 3 / 4 and found["easy"] == 1
    assert found["hard_chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 4) / 4)
    assert found["easy_chance"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    # In the wide picture every colour is found, so that all candidates tie.
    assert found["hard_conditioned"] == 1 / 4 and found["easy_conditioned"] == 1 / 2
    assert (found["hard_questions"], found["easy_questions"]) == (4, 2)
    assert (found["hard_left_out"], found["easy_left_out"]) == (0, 0)
    assert len(found) == 10
    assert model.images == {1: 6, 2: 3, 4: 2, 64: 2}[batch_size]  # each picture once in a batch
    assert model.training and model.pool.training


def test_pictures_that_cannot_be_read(tmp_path, caplog):
    broken, missing = colours.save_broken(tmp_path / "broken.png"), tmp_path / "missing.png"
    good = questions(tmp_path)
    bad = [(name, Choice(file, (0, 0, 8, 8), "red", ("blue",)))
           for name, file in (("hard", broken), ("easy", missing), ("easy", broken))]  # fmt: skip
    truth = choice_accuracy(colours.ColourModel(), Tokenizer(), good, batch_size=2)
    mixed = [bad[0], *good[:2], bad[1], *good[2:], bad[2]]
    found = choice_accuracy(colours.ColourModel(), Tokenizer(), mixed, batch_size=2)
    assert found == truth | {"hard_left_out": 1, "easy_left_out": 2}
    assert f"left out {missing}" in caplog.text
    with pytest.raises(NoPicturesError, match="easy: no picture of 2 questions"):
        choice_accuracy(colours.ColourModel(), Tokenizer(), [*bad, good[0]], batch_size=2)


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match="at least one negative"):
        choice_accuracy(
            colours.ColourModel(), Tokenizer(), [("hard", Choice(tmp_path, (0, 0, 1, 1), "red", ()))], batch_size=2
        )


def ranks_equal_one_process(folder: Path) -> None:
    texts = ("red", "green", "blue", "red blue", "blue green")
    questions = [
        (name, Choice(folder / f"{i % 7}.png", (0, 0, 8 + i, 16), texts[i % 5], texts[i % 5 + 1 :] or texts[:2]))
        for i in range(11)
        for name in (("hard", "easy") if i % 2 else ("hard",))
    ]
    model = colours.ColourModel()
    together, alone = (
        choice_accuracy(model, Tokenizer(), questions, batch_size=3, process_group=group)
        for group in (ProcessGroup.of(), SINGLE_PROCESS)
    )
    assert together == pytest.approx(alone, abs=1e-12)
    assert 0 < alone["hard"] < 1 and alone["hard_left_out"] == 3


@needs_gloo
def test_ranks_equal_one_process(tmp_path):
    """With shares of unequal sizes and pictures that cannot be read."""
    colours.save_seven(tmp_path)
    processes(3, ranks_equal_one_process, tmp_path, tmp_path)

"""The wrong choices of a model whose answers are known."""

import json

import pytest
from support import colours

from betaclip.data.scenes import dataset as scenes
from betaclip.evaluation.run import Evaluator
from betaclip.evaluation.sets import EvaluationConfig
from betaclip.evaluation.tasks.scenes import evaluate_scenes
from betaclip.model.tokenizer import Tokenizer
from betaclip.page import mistakes as module
from betaclip.page.mistakes import differing, mistakes


def test_scenes():
    """As many as the evaluation counts, each with the true text and one of the false ones."""
    model = colours.ColourModel().eval()
    found = mistakes(model, Evaluator(EvaluationConfig(scenes=5)))
    values = evaluate_scenes(model, Tokenizer(), seed=0, count=5, conditioned=False)
    asked = list(scenes.choices(0, 5, colours.SIZE))
    assert [one.kind.partition(":")[0] for one in found] == list(scenes.DIFFICULTIES)
    for difficulty, one in zip(scenes.DIFFICULTIES, found, strict=True):
        assert (one.asked, one.wrong) == (5, round(5 * (1 - values[f"choices/{difficulty}"])))
        assert len(one.first) == min(one.wrong, module.SHOWN)
        for wrong in one.first:
            (choice,) = (choice for choice in asked if choice.positive == wrong.right)
            assert " ".join(words for words, _ in wrong.chosen) in choice.negatives[difficulty]
            left, top, width, height = (value * colours.SIZE / 100 for value in wrong.place)
            assert (left, top, left + width, top + height) == pytest.approx(choice.box, abs=0.02)
            assert wrong.drawing.width == wrong.drawing.height == module.MAX_SIDE


def test_files(tmp_path):
    """A question of an FG-OVD file: a box in a wide picture, and the text that was chosen instead."""
    colours.save(tmp_path / "train2017" / "a.png", colours.picture({(0, 1): "red", (2, 3): "green"}, 160, 64))
    x0, y0, x1, y1 = colours.box_of(0, 1, 160, 64)
    row = {
        "img_path": "train2017/a.png", "bbox": [x0, y0, x1 - x0, y1 - y0], "pos_expression": "a green cup",
        "neg_expression": ["a blue cup", "a red cup"],
    }  # fmt: skip
    (tmp_path / "h_attributes.jsonl").write_text(json.dumps(row))
    (one,) = mistakes(colours.ColourModel().eval(), Evaluator(EvaluationConfig(fg_ovd=tmp_path)))
    assert (one.asked, one.wrong) == (1, 1) and one.kind.startswith("FG-OVD, ")
    (wrong,) = one.first
    assert wrong.right == "a green cup" and wrong.chosen == [("a", False), ("red", True), ("cup", False)]
    assert wrong.place == (25, 0, 25, 25) and (wrong.drawing.width, wrong.drawing.height) == (160, 64)


def test_none_without_choices():
    assert mistakes(colours.ColourModel(), Evaluator(EvaluationConfig())) == []


def test_differing():
    assert differing("a red mug", "a red mug") == [("a red mug", False)]
    assert differing("a red mug", "a blue striped mug") == [("a", False), ("blue striped", True), ("mug", False)]
    assert differing("红色的杯子", "蓝色的杯子") == [("蓝色的杯子", True)]

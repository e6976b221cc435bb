"""A set of questions, whatever it was read from."""

from pathlib import Path

import pytest

from betaclip.data.batches import Bad
from betaclip.data.multiple_choice import Choice, ChoiceSet


def test_questions():
    choice = Choice(Path("a.jpg"), (0, 0, 5, 7), "a red mug", ("a blue mug",))
    found = ChoiceSet("x", [choice], [Bad("row 2", "broken")])
    assert list(found) == [choice] and len(found) == 1


def test_rejects_a_set_without_questions():
    with pytest.raises(ValueError, match=r"^fg_ovd: a\.json has no usable row$"):
        ChoiceSet("fg_ovd: a.json", [], [])
    with pytest.raises(ValueError, match=r"^x has no usable row; the first: row 1: broken$"):
        ChoiceSet("x", [], [Bad("row 1", "broken"), Bad("row 2", "empty")])

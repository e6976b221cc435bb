"""The leak of a model whose right answers are known."""

import pytest
import torch
from support import colours
from support.ranks import needs_gloo, processes

from betaclip.evaluation.encode import Squash
from betaclip.evaluation.tasks.leak import leak
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

# The text that a picture's text pools from the next picture is that of the picture's own colours there.
PICTURES = [
    (colours.picture({(0, 1): "red", (2, 2): "green"}), ["red"]),
    (colours.picture({(1, 1): "blue"}), ["a blue square"]),
    (colours.picture({(3, 1): "green"}), ["green"]),
    (colours.picture({(0, 0): "red"}), ["red"]),  # its text is not new
]


def measured(pictures, model=None, **options):
    model = colours.ColourModel() if model is None else model
    return leak(model, Tokenizer(), pictures, Squash(colours.SIZE), **{"batch_size": 2} | options)


def counts(own, other):
    return {"own_pictures": own, "other_pictures": other, "texts": 3}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_known_model(batch_size):
    """Each text finds its own colour; in another picture only green does, which the red one's picture has as well."""
    found = measured(PICTURES, batch_size=batch_size)
    assert found == {"own_picture": 1, "other_picture": pytest.approx(1 / 3), **counts(3, 3)}


def test_model_that_ignores_the_picture():
    """It pools what it was asked for."""
    model = colours.ColourModel()
    model.pool.forward = lambda patches, texts: texts
    assert measured(PICTURES, model) == {"own_picture": 1, "other_picture": 1, **counts(3, 3)}


def test_picture_with_an_equal_text_is_left_out():
    """The first picture has green as its second text; it is the one that green would be asked of."""
    pictures = [(PICTURES[0][0], ["red", "green"]), *PICTURES[1:]]
    assert measured(pictures) == {"own_picture": 1, "other_picture": 0, **counts(3, 2)}


def test_pictures_that_cannot_be_read(tmp_path):
    broken = tmp_path / "broken.png"
    colours.save_broken(broken)
    found = measured([(broken, ["red"]), *PICTURES[1:3]])
    assert found == {"own_picture": 1, "other_picture": 0, **counts(2, 2)}


def test_nothing_to_compare():
    assert measured(PICTURES[:1]) == measured([PICTURES[0], PICTURES[3]]) == {}


def ranks_equal_one_process() -> None:
    torch.manual_seed(0)
    names = [" ".join(colours.NAMES[: 1 + i % 3]) + " red" * i for i in range(5)]
    pictures = [(colours.noise(i), [name]) for i, name in enumerate(names)]
    together, alone = (measured(pictures, process_group=group) for group in (ProcessGroup.of(), SINGLE_PROCESS))
    assert together == pytest.approx(alone) and alone["texts"] == 5


@needs_gloo
def test_ranks_equal_one_process(tmp_path):
    processes(3, ranks_equal_one_process, tmp_path)

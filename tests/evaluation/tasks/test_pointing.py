"""Attention inside boxes: closed forms, and a model that attends to the colour it reads."""

from dataclasses import replace

import pytest
import torch
from support import colours
from support.ranks import needs_gloo, processes

from betaclip.data.scenes.dataset import Scene, scene
from betaclip.evaluation.tasks.pointing import mass_in_boxes, pointing
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup


def test_mass_in_boxes():
    grid = (2, 3)
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1.5, 2], [0, 0, 3, 2], [1, 1, 2, 2]])
    peak = torch.zeros(6)
    peak[1] = 1  # row 0, column 1
    mass, share = mass_in_boxes(peak.expand(4, 6), boxes, grid)
    torch.testing.assert_close(mass, torch.tensor([0, 0.5, 1, 0]))
    torch.testing.assert_close(share, torch.tensor([1 / 6, 1 / 2, 1, 1 / 6]))
    even = torch.full((4, 6), 1 / 6)
    torch.testing.assert_close(*mass_in_boxes(even, boxes, grid))
    torch.testing.assert_close(
        mass_in_boxes(peak.expand(4, 6) / 4, boxes, grid)[0], mass
    )  # a key of zeros has the rest
    assert not mass_in_boxes(torch.zeros(4, 6), boxes, grid)[0].any()


def coloured(squares: colours.Squares, phrases: dict[str, tuple[int, int, int, int]], side: int) -> Scene:
    image = colours.picture(squares, side, side)
    return replace(scene(0, 0), image=image, phrases=list(phrases), boxes=list(phrases.values()))


def coloured_scenes() -> list[Scene]:
    """Five phrases and boxes of a 16th of the picture: three look into their box, one outside, one half into it."""
    first, second = {(0, 1): "red", (2, 3): "green"}, {(1, 2): "blue", (3, 3): "blue"}
    box = colours.box_of
    return [
        coloured(first, {"a red square": box(0, 1), "green": box(2, 3), "the green": box(0, 1)}, colours.SIZE),
        # Larger than the model's own pictures.
        coloured(first, {"red": box(0, 1, 64, 64)}, 64),
        coloured(second, {"blue": box(1, 2)}, colours.SIZE),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_known_model(batch_size):
    found = pointing(colours.ColourModel(), Tokenizer(), coloured_scenes(), batch_size=batch_size)
    assert found["phrases"] == 5
    assert found["box_share"] == pytest.approx(1 / 16)
    # Bicubic resizing of the second scene leaves some colour beside the box.
    assert found["mass_in_box"] == pytest.approx(3.5 / 5, abs=0.01)
    assert found["ratio"] == pytest.approx(found["mass_in_box"] / found["box_share"])


def test_even_attention_is_chance():
    found = pointing(colours.ColourModel(sharpness=0), Tokenizer(), coloured_scenes(), batch_size=2)
    assert found["ratio"] == pytest.approx(1)


def test_rejects():
    with pytest.raises(ValueError, match="at least one phrase"):
        pointing(colours.ColourModel(), Tokenizer(), [coloured({}, {}, 32)], batch_size=1)


def ranks_equal_one_process() -> None:
    colours_and_boxes = [(["red", "blue", "green"][: i % 4], [(0, 0, 9, 20)] * (i % 4)) for i in range(5)]
    scenes = [
        replace(scene(0, i), image=colours.noise(i), phrases=phrases, boxes=boxes)
        for i, (phrases, boxes) in enumerate(colours_and_boxes)
    ]
    together, alone = (
        pointing(colours.ColourModel(), Tokenizer(), scenes, batch_size=2, process_group=group)
        for group in (ProcessGroup.of(), SINGLE_PROCESS)
    )
    assert together == pytest.approx(alone, abs=1e-12)
    assert 0 < alone["mass_in_box"] < 1


@needs_gloo
def test_ranks_equal_one_process(tmp_path):
    processes(3, ranks_equal_one_process, tmp_path)

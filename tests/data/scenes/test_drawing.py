"""The drawing shows what the layout says: colours, shapes, patterns, sizes, and boxes that fit."""

import itertools
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from betaclip.data.scenes.drawing import draw
from betaclip.data.scenes.layout import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    TEXTURES,
    Kind,
    Layout,
    Thing,
    random_layout,
)

LAYOUTS = [random_layout(Random(f"{i}")) for i in range(300)]


def _one(kind: Kind, background: str = "light gray", radius: float = 0.2) -> Layout:
    thing = Thing(kind, 4, 0.5, 0.5, radius, (1.0, 0.0), COLOURS[kind.colour])
    return Layout(background, "plain", (0.0, 0.0), (thing,))


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_exact(size, shape):
    """Boxes enclose all pixels that show more of the thing than of the background."""
    for x, y, turn in ((0.3, 0.62, 0.0), (0.71, 0.4, 0.2)):
        thing = replace(_one(Kind("large", "plain", "yellow", shape)).things[0], x=x, y=y)
        thing = replace(thing, angle=(float(np.cos(turn)), float(np.sin(turn))))
        image, ((x0, y0, x1, y1),) = draw(Layout("light gray", "plain", (0.0, 0.0), (thing,)), size)
        share = (BACKGROUNDS["light gray"][2] - image[..., 2].astype(float)) / (
            BACKGROUNDS["light gray"][2] - thing.rgb[2]
        )
        outside = share.copy()
        outside[y0:y1, x0:x1] = 0
        assert outside.max() < 0.51
        inside = share[y0:y1, x0:x1]
        assert min(edge.max() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1])) > 0.49


def test_boxes_hold_what_changes():
    for layout in LAYOUTS[:60]:
        image, boxes = draw(layout, 64)
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            without, _ = draw(replace(layout, things=layout.things[:i] + layout.things[i + 1 :]), 64)
            changed = (image != without).any(-1)
            assert changed[y0:y1, x0:x1].mean() > 0.2
            changed[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = (
                False  # sharp points that cover half of no pixel
            )
            assert not changed.any()


def test_boxes_are_apart_and_of_their_size():
    for layout in LAYOUTS:
        boxes = draw(layout, 64)[1]
        for thing, (x0, y0, x1, y1) in zip(layout.things, boxes, strict=True):
            assert x0 <= 64 * thing.x <= x1 and y0 <= 64 * thing.y <= y1
            assert 2 * 64 * thing.radius * 0.6 < max(x1 - x0, y1 - y0) <= 2 * 64 * thing.radius + 1
        for a, b in itertools.combinations(layout.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("colour", COLOURS)
def test_colours(colour):
    """The colour that covers most of a thing's middle is nearest to the colour of its name."""
    for pattern, shape in itertools.product(("plain", "dotted"), ("square", "circle", "star")):
        image, _ = draw(_one(Kind("large", pattern, colour, shape)), 64)
        middle = image[26:38, 26:38].reshape(-1, 3).astype(float)
        nearest = [min(COLOURS, key=lambda name: np.square(pixel - COLOURS[name]).sum()) for pixel in middle]
        assert max(COLOURS, key=nearest.count) == colour


@pytest.mark.parametrize("size", [64, 96])
def test_kinds_look_different(size):
    """If any one attribute changes, a small thing changes by more than its shade may vary."""
    radius = {name: sum(radii) / 2 for name, radii in SIZES.items()}
    for background in BACKGROUNDS:
        for kind in (Kind("small", "plain", "red", "star"), Kind("small", "striped", "blue", "ring")):
            image, box = draw(_one(kind, background, radius[kind.size]), size)
            x0, y0, x1, y1 = box[0]
            for field, values in enumerate(ATTRIBUTES):
                for value in values:
                    other = Kind(*kind[:field], value, *kind[field + 1 :])
                    if other == kind:
                        continue
                    changed, _ = draw(_one(other, background, radius[other.size]), size)
                    difference = np.abs(image.astype(float) - changed)[y0:y1, x0:x1].mean()
                    assert difference > 8, (background, kind, other, difference)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_things_stand_out(background):
    for colour in COLOURS.values():
        assert np.abs(np.subtract(BACKGROUNDS[background], colour)).max() > 60, colour


@pytest.mark.parametrize("colour", COLOURS)
def test_marks_stand_out(colour):
    for pattern in PATTERNS[1:]:
        image = draw(_one(Kind("large", pattern, colour, "square")), 144)[0][60:84, 60:84].reshape(-1, 3).astype(float)
        assert np.ptp(image, axis=0).max() > 120, pattern


def test_textures():
    layout = replace(LAYOUTS[0], things=(), background="light gray", slope=(0.8, -0.6))
    plain, shaded = (draw(replace(layout, texture=texture), 72)[0].astype(int) for texture in TEXTURES)
    assert (plain == BACKGROUNDS["light gray"]).all()
    assert np.abs(np.diff(shaded, axis=1)).max() <= 1 and np.abs(np.diff(shaded, axis=0)).max() <= 1
    across, down = shaded[:, -1] - shaded[:, 0], shaded[-1] - shaded[0]
    assert np.abs(across - 0.8 * 48).max() <= 1 and np.abs(down + 0.6 * 48).max() <= 1
    assert abs(shaded.mean() - plain.mean()) < 1


def test_places_in_the_picture():
    layout = random_layout(Random("corner"))
    thing = replace(layout.things[0], x=0.15, y=0.8, radius=0.1)
    ((x0, y0, x1, y1),) = draw(replace(layout, things=(thing,)), 100)[1]
    assert (x0 + x1) / 2 == pytest.approx(15, abs=3) and (y0 + y1) / 2 == pytest.approx(80, abs=3)

"""Draws the layout of a scene: every pixel takes the share of it that a shape covers, from the distance to its edge."""

from random import Random

import numpy as np
import numpy.typing as npt

from betaclip.data.scene_layout import BACKGROUNDS, Layout, Thing

Array = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]

_PERIOD = 0.078  # of stripes, dots and checks, as a share of the picture: 5 pixels of 64
_OUTLINE = 0.18  # as a share of the radius
_DARK, _GRAY, _LIGHT = (np.full(3, value, np.float32) for value in (20, 125, 250))
_MARKS = {"yellow": _DARK, "white": _GRAY, "black": _GRAY}  # black marks on white would be white marks on black
_GRAIN = np.frombuffer(Random(0).randbytes(128 * 128), np.uint8).reshape(128, 128).astype(np.float32) / 255 - 0.5


def draw(layout: Layout, size: int) -> tuple[npt.NDArray[np.uint8], list[Box]]:
    """(size, size, 3) picture, and of each thing the box (x0, y0, x1, y1) of the pixels that it half covers or more."""
    canvas = _background(layout, size)
    boxes = [_draw_thing(canvas, thing, _rgb(BACKGROUNDS[layout.background][0])) for thing in layout.things]
    return np.rint(canvas).astype(np.uint8), boxes


def _rgb(values: tuple[float, float, float]) -> Array:
    return np.array(values, np.float32)


def _background(layout: Layout, size: int) -> Array:
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = _rgb(BACKGROUNDS[layout.background][0])
    if layout.texture == "shaded":
        slope = np.linspace(-24, 24, size, dtype=np.float32)
        across, down = (np.float32(2 * phase - 1) for phase in layout.phase)
        canvas += (slope * across + slope[:, None] * down)[..., None]
    elif layout.texture == "textured":
        column, row = (np.arange(size) + int(phase * 128) for phase in layout.phase)
        canvas += 30 * _GRAIN[row[:, None] % 128, column % 128][..., None]
    return canvas.clip(0, 255, out=canvas)


def _draw_thing(canvas: Array, thing: Thing, background: Array) -> Box:
    """Onto the canvas; the thing's box."""
    size = len(canvas)
    reach = thing.radius * size + 1
    x0, y0 = (max(0, int(centre * size - reach)) for centre in (thing.x, thing.y))
    x1, y1 = (min(size, int(centre * size + reach) + 1) for centre in (thing.x, thing.y))
    # From the thing's centre to those of the pixels, in pixels, turned with the thing.
    x = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - thing.x * size)
    y = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - thing.y * size))[:, None]
    cosine, sine = (np.float32(value) for value in thing.angle)
    x, y = x * cosine + y * sine, y * cosine - x * sine
    radius = np.float32(thing.radius * size)
    distance = _DISTANCES[thing.kind.shape](x / radius, y / radius) * radius
    covered, colours = _below(distance), _rgb(thing.rgb)
    if thing.kind.pattern == "outlined":
        share, mark = _below(-distance - np.float32(_OUTLINE) * radius), _outline(colours, background)
        colours = colours + share[..., None] * (mark - colours)
    elif thing.kind.pattern != "plain":
        share = _marked(thing.kind.pattern, x, y, np.float32(_PERIOD * size))
        mark = _MARKS.get(thing.kind.colour, _LIGHT)
        colours = colours + share[..., None] * (mark - colours)
    region = canvas[y0:y1, x0:x1]
    region += covered[..., None] * (colours - region)
    half = covered >= 0.5
    columns, rows = (np.flatnonzero(half.any(axis)) for axis in (0, 1))
    return x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1


def _below(distance: Array) -> Array:
    """Share of each pixel where the distance, in pixels, is below 0."""
    return np.minimum(np.maximum(np.float32(0.5) - distance, 0), 1)


def _outline(colour: Array, background: Array) -> Array:
    """The colour of an outline that stands out from both."""
    return max((_DARK, _GRAY, _LIGHT), key=lambda c: min(((c - other) ** 2).sum() for other in (colour, background)))


def _marked(pattern: str, x: Array, y: Array, period: np.float32) -> Array:
    """Share of each pixel that has the pattern's second colour."""
    if pattern == "striped":
        return _below(_to_band((x + y) * np.float32(0.5**0.5), period))
    if pattern == "dotted":
        across, down = (np.abs(v / period - np.floor(v / period) - np.float32(0.5)) * period for v in (x, y))
        return _below(np.sqrt(across * across + down * down) - np.float32(0.32) * period)
    across, down = (_below(_to_band(v, np.float32(1.3) * period)) for v in (x, y))
    return across + down - 2 * across * down


def _to_band(position: Array, period: np.float32) -> Array:
    """Distance to the bands that fill half of every period, negative within."""
    return (np.abs(position / period - np.floor(position / period) - np.float32(0.5)) - np.float32(0.25)) * period


# Distance to the edge, in radii, negative inside; right near the edge, which is all that drawing needs. A shape lies
# within the unit circle; y points downwards.


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(0.95)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.75)


def _triangle(x: Array, y: Array) -> Array:
    side = np.abs(x) * np.float32(0.87) - (y + np.float32(0.95)) * np.float32(0.5)
    return np.maximum(side, y - np.float32(0.68))


def _diamond(x: Array, y: Array) -> Array:
    return np.abs(x) * np.float32(0.81) + (np.abs(y) - np.float32(0.98)) * np.float32(0.59)


def _star(x: Array, y: Array) -> Array:
    # Folding the plane twice turns the nearest of five points upwards.
    x, y = np.abs(x), -y
    across, down = np.float32(0.809017), np.float32(0.587785)
    for side in (across, -across):
        beyond = np.float32(2) * np.maximum(side * x - down * y, np.float32(0))
        x, y = x - beyond * side, y + beyond * down
    # From a point, at (0, 1), to the notch beside it.
    return np.abs(x) * np.float32(0.86) + (y - np.float32(1)) * np.float32(0.51)


def _heart(x: Array, y: Array) -> Array:
    x, y = np.abs(x), y + np.float32(0.05)
    lobe = np.sqrt((x - np.float32(0.42)) ** 2 + (y + np.float32(0.3)) ** 2) - np.float32(0.5)
    # Below the lines at which the sides touch the lobes, overlapping them, so that no edge runs through the inside.
    below = (x - np.float32(0.42)) * np.float32(0.67) - (y + np.float32(0.3)) * np.float32(0.74)
    side = x * np.float32(0.74) + y * np.float32(0.67) - np.float32(0.61)
    return np.minimum(lobe, np.maximum(np.maximum(side, below), -y - np.float32(0.5)))


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(0.92), np.minimum(x, y) - np.float32(0.3))


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.68)) - np.float32(0.27)


def _crescent(x: Array, y: Array) -> Array:
    bite = np.sqrt((x - np.float32(0.48)) ** 2 + y * y) - np.float32(0.72)
    return np.maximum(_circle(x, y), -bite)


def _arrow(x: Array, y: Array) -> Array:
    y = np.abs(y)
    head = np.maximum(x * np.float32(0.7) + y * np.float32(0.71) - np.float32(0.66), -x)
    shaft = np.maximum(np.maximum(y - np.float32(0.3), x - np.float32(0.45)), -x - np.float32(0.92))
    return np.minimum(head, shaft)


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "arrow": _arrow,
}

"""Draws the layout of a scene.

The share of a pixel that a shape covers follows from the pixel's distance to the shape's edge. A picture is drawn as
three planes, one of each colour: NumPy's inner loops then run along rows of pixels, and not over three colours.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from betaclip.data.scenes.layout import BACKGROUNDS, Layout, Thing

Array = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]

_PERIOD = 0.078  # of stripes and dots, as a share of the picture
# Brightness of a thing's stripes and dots, as a share of the thing's: they are darker than any background, so that its
# outline stays complete.
_MARK = np.float32(0.35)


def draw(layout: Layout, size: int) -> tuple[npt.NDArray[np.uint8], list[Box]]:
    """The picture, (size, size, 3), and each thing's box (x0, y0, x1, y1) of the pixels that it covers half or more."""
    canvas = _background(layout, size)
    boxes = [_draw_thing(canvas, thing) for thing in layout.things]
    return np.rint(canvas, out=canvas).astype(np.uint8).transpose(1, 2, 0), boxes


def _rgb(values: tuple[float, float, float]) -> Array:
    """(3, 1, 1)"""
    return np.array(values, np.float32)[:, None, None]


def _background(layout: Layout, size: int) -> Array:
    """(3, size, size)"""
    canvas = np.empty((3, size, size), np.float32)
    canvas[:] = _rgb(BACKGROUNDS[layout.background])
    if layout.texture == "shaded":
        ramp = _ramp(size)
        across, down = (np.float32(slope) for slope in layout.slope)
        canvas += ramp * across + ramp[:, None] * down
        np.minimum(canvas, 255, out=canvas)  # no background is dark enough to fall below 0
    return canvas


@lru_cache
def _ramp(size: int) -> Array:
    """The change of the background's shade from one side of the picture to the other, at a slope of 1."""
    return np.linspace(-24, 24, size, dtype=np.float32)


def _draw_thing(canvas: Array, thing: Thing) -> Box:
    """Draw a thing onto the canvas; return its box."""
    size = canvas.shape[1]
    reach = thing.radius * size + 1
    x0, y0 = (max(0, int(centre * size - reach)) for centre in (thing.x, thing.y))
    x1, y1 = (min(size, int(centre * size + reach) + 1) for centre in (thing.x, thing.y))
    # Vectors from the thing's centre to the centres of the pixels, in pixels, turned with the thing.
    x = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - thing.x * size)
    y = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - thing.y * size))[:, None]
    cosine, sine = (np.float32(value) for value in thing.angle)
    x, y = x * cosine + y * sine, y * cosine - x * sine
    radius = np.float32(thing.radius * size)
    distance = _DISTANCES[thing.kind.shape](x / radius, y / radius) * radius
    covered, colours = _below(distance), _rgb(thing.rgb)
    if thing.kind.pattern != "plain":
        share = _marked(thing.kind.pattern, x, y, np.float32(_PERIOD * size))
        colours = colours * (1 - (1 - _MARK) * share)
    region = canvas[:, y0:y1, x0:x1]
    region += covered * (colours - region)
    half = covered >= 0.5
    columns, rows = (np.flatnonzero(half.any(axis)) for axis in (0, 1))
    return x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1


def _below(distance: Array) -> Array:
    """The share of each pixel in which the distance, in pixels, is below 0."""
    return np.minimum(np.maximum(np.float32(0.5) - distance, 0), 1)


def _marked(pattern: str, x: Array, y: Array, period: np.float32) -> Array:
    """The share of each pixel that has the pattern's second colour."""
    if pattern == "striped":
        return _below(_to_band((x + y) * np.float32(0.5**0.5), period))
    across, down = (np.abs(v / period - np.floor(v / period) - np.float32(0.5)) * period for v in (x, y))
    return _below(np.sqrt(across * across + down * down) - np.float32(0.32) * period)


def _to_band(position: Array, period: np.float32) -> Array:
    """The distance to the bands that fill half of every period, negative inside them."""
    return (np.abs(position / period - np.floor(position / period) - np.float32(0.5)) - np.float32(0.25)) * period


# Each of these functions gives the distance to a shape's edge, in radii, negative inside the shape. It is exact only
# near the edge, where drawing needs it. Shapes lie within the unit circle; y points downwards.


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(0.95)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.75)


def _triangle(x: Array, y: Array) -> Array:
    side = np.abs(x) * np.float32(0.87) - (y + np.float32(0.95)) * np.float32(0.5)
    return np.maximum(side, y - np.float32(0.68))


def _star(x: Array, y: Array) -> Array:
    # Two reflections bring each place to the star's upper point.
    x, y = np.abs(x), -y
    across, down = np.float32(0.809017), np.float32(0.587785)
    for side in (across, -across):
        beyond = np.float32(2) * np.maximum(side * x - down * y, np.float32(0))
        x, y = x - beyond * side, y + beyond * down
    # The edge runs from that point, at (0, 1), to the notch beside it.
    return np.abs(x) * np.float32(0.86) + (y - np.float32(1)) * np.float32(0.51)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(0.92), np.minimum(x, y) - np.float32(0.3))


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.68)) - np.float32(0.27)


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}

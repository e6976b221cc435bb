"""Chooses at random the things in a rendered scene and their places, before anything is drawn or described.

Lengths are fractions of the picture's side; x points to the right and y downwards.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

SIZES = {"small": (0.085, 0.095), "large": (0.14, 0.15)}  # radii
PATTERNS = ("plain", "striped", "dotted")
# Models learn colours first. There are few, so that many things in a batch share one and must be told apart by more.
COLOURS = {"red": (214, 40, 40), "yellow": (250, 215, 40), "blue": (35, 90, 220)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = {"light gray": (205, 207, 211), "light green": (190, 226, 190)}
TEXTURES = ("plain", "shaded")
MAX_THINGS = 3

_JITTER = 0.015  # distance of a thing from its cell's centre; so small that things neither touch nor leave the picture


class Kind(NamedTuple):
    """The looks of a thing; the fields are in the order of English adjectives."""

    size: str
    pattern: str
    colour: str
    shape: str


ATTRIBUTES = (tuple(SIZES), PATTERNS, tuple(COLOURS), SHAPES)  # the values of each field of Kind


@dataclass(frozen=True)
class Thing:
    """A thing and its place.

    cell: column + 3 * row, on a grid of 3 × 3, of the centre (x, y). angle: (cosine, sine) of a small rotation.
    rgb: its colour, which varies a little around that of its kind.
    """

    kind: Kind
    cell: int
    x: float
    y: float
    radius: float
    angle: tuple[float, float]
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """Two or three things of different kinds, in different cells, on a background.

    slope: the change of the background's shade to the right and downwards, if its texture is shaded.
    """

    background: str
    texture: str
    slope: tuple[float, float]
    things: tuple[Thing, ...]


def random_layout(rng: Random) -> Layout:
    """Choose a layout; it depends only on the generator's state."""
    background, texture = rng.choice(tuple(BACKGROUNDS)), rng.choice(TEXTURES)
    slope = rng.uniform(-1, 1), rng.uniform(-1, 1)
    kinds = _random_kinds(rng, rng.randint(2, MAX_THINGS))
    cells = rng.sample(range(9), len(kinds))
    return Layout(background, texture, slope, tuple(_thing(rng, *one) for one in zip(kinds, cells, strict=True)))


def _random_kinds(rng: Random, count: int) -> list[Kind]:
    """Choose different kinds. In two of five cases one gets another's shape or colour, so that a single attribute does
    not always tell them apart."""
    kinds: list[Kind] = []
    while len(kinds) < count:
        kind = Kind(*map(rng.choice, ATTRIBUTES))
        if kinds and rng.random() < 0.4:
            like = rng.choice(kinds)
            kind = kind._replace(shape=like.shape) if rng.random() < 0.5 else kind._replace(colour=like.colour)
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def _thing(rng: Random, kind: Kind, cell: int) -> Thing:
    x, y = ((third + 0.5) / 3 + rng.uniform(-_JITTER, _JITTER) for third in (cell % 3, cell // 3))
    turn = rng.uniform(-0.2, 0.2)
    # Rounded, so that the picture does not depend on the platform's libm.
    angle = (round(math.cos(turn), 6), round(math.sin(turn), 6))
    red, green, blue = (min(255.0, max(0.0, value + rng.uniform(-12, 12))) for value in COLOURS[kind.colour])
    return Thing(kind, cell, x, y, rng.uniform(*SIZES[kind.size]), angle, (red, green, blue))

"""What is in a rendered scene and where: chosen at random, before anything is drawn or described.

Lengths are shares of the picture's side, x to the right and y downwards.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

SIZES = {"small": (0.1, 0.12), "large": (0.175, 0.21)}  # radii
PATTERNS = ("plain", "striped", "dotted", "checked", "outlined")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 215, 40),
    "green": (40, 150, 60),
    "blue": (35, 90, 220),
    "purple": (130, 50, 170),
    "pink": (250, 130, 185),
    "brown": (125, 75, 35),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "crescent", "arrow")
# The colours that can be told from each background.
BACKGROUNDS = {
    "light gray": ((192, 194, 198), tuple(c for c in COLOURS if c != "white")),
    "beige": ((224, 208, 176), tuple(c for c in COLOURS if c not in ("white", "yellow"))),
    "light blue": ((165, 205, 232), tuple(c for c in COLOURS if c != "white")),
    "light green": ((178, 218, 178), tuple(c for c in COLOURS if c != "white")),
    "dark gray": ((72, 74, 80), tuple(c for c in COLOURS if c not in ("black", "brown", "purple"))),
    "dark blue": ((22, 34, 78), tuple(c for c in COLOURS if c not in ("black", "brown", "purple", "blue"))),
}
TEXTURES = ("plain", "shaded", "textured")
MOST_THINGS = 5

_MARGIN, _GAP = 0.015, 0.03
# Where a centre may lie in each third of the picture; nothing lies near a border between thirds, so that what is
# "on the left" is so beyond doubt.
_THIRDS = ((0.0, 0.33), (0.43, 0.57), (0.67, 1.0))


class Kind(NamedTuple):
    """The attributes of a thing, in the order of English adjectives."""

    size: str
    pattern: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Thing:
    """cell: column + 3 * row of the third of the picture that the centre (x, y) lies in; angle: (cosine, sine) of a
    small rotation; rgb: its colour, which varies a little."""

    kind: Kind
    cell: int
    x: float
    y: float
    radius: float
    angle: tuple[float, float]
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """Two to five things of different kinds, in different cells, apart; phase: of the background's texture."""

    background: str
    texture: str
    phase: tuple[float, float]
    things: tuple[Thing, ...]


def random_layout(rng: Random) -> Layout:
    """A layout, as a function of the generator's state."""
    background = rng.choice(tuple(BACKGROUNDS))
    texture, phase = rng.choice(TEXTURES), (rng.random(), rng.random())
    kinds = _random_kinds(rng, rng.randint(2, MOST_THINGS), BACKGROUNDS[background][1])
    radii = [rng.uniform(*SIZES[kind.size]) for kind in kinds]
    places = None
    while places is None:
        places = _random_places(rng, radii)
    things = (_thing(rng, *one) for one in zip(kinds, radii, places, strict=True))
    return Layout(background, texture, phase, tuple(things))


def _random_kinds(rng: Random, count: int, colours: tuple[str, ...]) -> list[Kind]:
    """Different ones, at most three of them large. In two of five cases a kind takes another's shape or colour, so that
    one attribute does not tell them apart."""
    kinds: list[Kind] = []
    while len(kinds) < count:
        size = rng.choice(tuple(SIZES)) if sum(kind.size == "large" for kind in kinds) < 3 else "small"
        kind = Kind(size, rng.choice(PATTERNS), rng.choice(colours), rng.choice(SHAPES))
        if kinds and rng.random() < 0.4:
            like = rng.choice(kinds)
            kind = kind._replace(shape=like.shape) if rng.random() < 0.5 else kind._replace(colour=like.colour)
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def _random_places(rng: Random, radii: list[float]) -> list[tuple[int, float, float]] | None:
    """Cell and centre of each, in different cells and apart; None if too many attempts met another thing."""
    places: dict[int, tuple[int, float, float]] = {}
    cells = list(range(9))
    for i in sorted(range(len(radii)), key=lambda i: -radii[i]):  # the large ones while there is room
        inset = radii[i] + _MARGIN
        for _ in range(12):
            cell = rng.choice(cells)
            x, y = (rng.uniform(max(low, inset), min(high, 1 - inset))
                    for low, high in (_THIRDS[cell % 3], _THIRDS[cell // 3]))  # fmt: skip
            if all(_apart(x - there[1], y - there[2], radii[i] + radii[j]) for j, there in places.items()):
                places[i] = cell, x, y
                cells.remove(cell)
                break
        else:
            return None
    return [places[i] for i in range(len(radii))]


def _apart(across: float, down: float, radii: float) -> bool:
    return across * across + down * down > (radii + _GAP) * (radii + _GAP)


def _thing(rng: Random, kind: Kind, radius: float, place: tuple[int, float, float]) -> Thing:
    turn = rng.uniform(-0.2, 0.2)
    # Rounded, so that no platform's libm shows in the picture.
    angle = (round(math.cos(turn), 6), round(math.sin(turn), 6))
    red, green, blue = (min(255.0, max(0.0, value + rng.uniform(-12, 12))) for value in COLOURS[kind.colour])
    return Thing(kind, *place, radius, angle, (red, green, blue))

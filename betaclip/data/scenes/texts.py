"""Describes the layout of a scene by sentences that are true of it, and by phrases that each fit only one thing.

A set of attributes is a bit mask over the fields of ``Kind``. A thing is named by a set that no other thing shares.
"""

from functools import lru_cache
from random import Random
from typing import NamedTuple

from betaclip.data.scenes.layout import Kind, Layout, Thing

SIZE, PATTERN, COLOUR, SHAPE = (1 << field for field in range(4))
ALL = SIZE | PATTERN | COLOUR | SHAPE

# Words for places, the narrowest first, and the cells that they include.
PLACES = {
    "in the upper left": (0,),
    "in the upper right": (2,),
    "in the lower left": (6,),
    "in the lower right": (8,),
    "in the center": (4,),
    "in the middle": (4,),
    "at the top": (0, 1, 2),
    "on the left": (0, 3, 6),
    "on the right": (2, 5, 8),
    "at the bottom": (6, 7, 8),
}
ANYWHERE = tuple(range(9))
_PLACES_OF = tuple(tuple(words for words, cells in PLACES.items() if cell in cells) for cell in range(9))
_NUMBERS = ("no", "one", "two", "three")
_SETS = tuple(s for s in range(1, ALL + 1) if s.bit_count() <= 2)  # enough to tell one of three things
_CLEAR = 0.2  # a thing is "above" or "left of" another if their centres are at least this far apart in that direction


class Phrase(NamedTuple):
    """A text and the numbers of the one or two things that it names."""

    text: str
    things: tuple[int, ...]


def noun(kind: Kind, attributes: int = ALL, colour_first: bool = False) -> str:
    """A name such as ``large striped red triangle``, with only the given attributes."""
    words = [word for field, word in enumerate(kind) if attributes & 1 << field]
    if colour_first and attributes & PATTERN and attributes & COLOUR:
        at = words.index(kind.pattern)
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words if attributes & SHAPE else [*words, "shape"])


def indefinite(phrase: str) -> str:
    return f"a {phrase}"


def relation(a: Thing, b: Thing) -> str | None:
    """The place of ``a`` relative to ``b``, along the axis on which they are farther apart; None if it is not clear."""
    across, down = a.x - b.x, a.y - b.y
    if max(abs(across), abs(down)) < _CLEAR:
        return None
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def describe(layout: Layout, rng: Random) -> tuple[list[str], list[Phrase]]:
    """Sentences, in the order of a caption, and phrases, all different."""
    writer = _Writer(layout, rng)
    return writer.sentences(), writer.phrases()


class _Writer:
    def __init__(self, layout: Layout, rng: Random) -> None:
        self._layout, self._rng = layout, rng
        # The set of attributes that each pair of things shares.
        kinds = [thing.kind for thing in layout.things]
        self._shared = [[sum(1 << f for f in range(4) if a[f] == b[f]) for b in kinds] for a in kinds]

    def sentences(self) -> list[str]:
        """Say what each thing is and where it is, in order; then compare two of them."""
        count, rng = len(self._layout.things), self._rng
        texts = [self._opening(), self._placed(0)]
        for i in range(1, count):
            text = self._related(i) if rng.random() < 0.6 else None
            texts.append(text or self._placed(i))
        for _ in range(rng.randint(1, 2) if count == 2 else 1):
            text = self._compared()
            if text and text not in texts:
                texts.append(text)
        return [f"{text[0].upper()}{text[1:]}." for text in texts]

    def _opening(self) -> str:
        layout, rng = self._layout, self._rng
        things = f"{_NUMBERS[len(layout.things)]} {rng.choice(('shapes', 'objects'))}"
        background = f"{layout.texture} {layout.background} background"
        return rng.choice(
            (
                f"{things} on {indefinite(background)}",
                f"there are {things} on {indefinite(background)}",
                f"{indefinite(background)} with {things}",
            )
        )

    def _placed(self, i: int) -> str:
        """Say what a thing is and its place."""
        thing = self._layout.things[i]
        name, place = indefinite(self._full(thing)), _PLACES_OF[thing.cell][0]
        return self._rng.choice((f"{name} is {place}", f"{name} sits {place}", f"{place} is {name}"))

    def _related(self, i: int) -> str | None:
        """Say what a thing is and where it lies from one that was mentioned before, if that is clear."""
        things, rng = self._layout.things, self._rng
        name = indefinite(self._full(things[i]))
        j = rng.randrange(i)
        where = relation(things[i], things[j])
        if where is None:
            return None
        if j == i - 1 and rng.random() < 0.5:
            side, _, of = where.partition(" ")
            return f"to its {side} is {name}" if of else f"{where} it is {name}"
        return f"{name} is {_long(where)} the {noun(things[j].kind, self._short(j))}"

    def _compared(self) -> str | None:
        """Compare two things, if there is something to say."""
        things, rng = self._layout.things, self._rng
        i, j = rng.sample(range(len(things)), 2)
        a, b = (noun(things[k].kind, self._short(k)) for k in (i, j))
        pattern, colour = things[i].kind.pattern, things[i].kind.colour
        shared = self._shared[i][j]
        if shared & COLOUR and colour not in f"{a} {b}":
            return f"the {a} and the {b} are both {colour}"
        if shared & PATTERN and pattern not in f"{a} {b}":
            return f"the {a} and the {b} are both {pattern}"
        if not shared & SIZE and rng.random() < 0.5:
            larger, smaller = (a, b) if things[i].kind.size == "large" else (b, a)
            return f"the {larger} is larger than the {smaller}"
        where = relation(things[i], things[j])
        return where and f"the {a} is {_long(where)} the {b}"

    def phrases(self) -> list[Phrase]:
        things, rng = self._layout.things, self._rng
        phrases = []
        for i, thing in enumerate(things):
            name = self._full(thing)
            phrases.append(Phrase(rng.choice((indefinite(name), indefinite(name), f"the {name}", name)), (i,)))
            if rng.random() < 0.6:
                phrases.append(Phrase(self._reference(i), (i,)))
        for _ in range(2):
            i, j = rng.sample(range(len(things)), 2)
            where = relation(things[i], things[j])
            if where and all(phrase.things != (i, j) for phrase in phrases):
                a, b = (noun(things[k].kind, self._short(k)) for k in (i, j))
                article = rng.choice((indefinite, "the {}".format))
                phrases.append(Phrase(f"{article(a)} {where} {article(b)}", (i, j)))
        return phrases

    def _full(self, thing: Thing) -> str:
        return noun(thing.kind, ALL, self._rng.random() < 0.3)

    def _reference(self, i: int) -> str:
        """Refer to a thing by one or two attributes, or by its place and attributes that are enough there."""
        thing, rng = self._layout.things[i], self._rng
        if rng.random() < 0.5:
            return f"the {noun(thing.kind, self._short(i))}"
        place = rng.choice(_PLACES_OF[thing.cell])
        return f"the {noun(thing.kind, self._short(i, PLACES[place]))} {place}"

    def _short(self, i: int, cells: tuple[int, ...] = ANYWHERE) -> int:
        """A set of one or two attributes that sets the thing apart from all others in ``cells``."""
        others = (j for j, thing in enumerate(self._layout.things) if j != i and thing.cell in cells)
        return self._rng.choice(_distinguishing(tuple(self._shared[i][j] for j in others)))


@lru_cache(maxsize=1 << 16)
def _distinguishing(shared: tuple[int, ...]) -> tuple[int, ...]:
    """The sets of one or two attributes that are subsets of none of ``shared``, which has at most two sets."""
    return tuple(s for s in _SETS if all(s & other != s for other in shared))


def _long(where: str) -> str:
    return f"to the {where}" if where.endswith("of") else where

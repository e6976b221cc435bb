"""Layouts: the things of a scene differ, lie apart, and depend only on the generator's state."""

from collections import Counter
from random import Random

from betaclip.data.scenes.layout import ATTRIBUTES, COLOURS, MAX_THINGS, SIZES, random_layout

LAYOUTS = [random_layout(Random(f"{i}")) for i in range(1000)]


def test_is_a_function_of_the_state():
    assert LAYOUTS[:50] == [random_layout(Random(f"{i}")) for i in range(50)]
    assert len(set(map(repr, LAYOUTS))) == len(LAYOUTS)


def test_things_are_of_different_kinds_in_different_cells():
    for layout in LAYOUTS:
        assert 2 <= len(layout.things) <= MAX_THINGS
        assert len({thing.kind for thing in layout.things}) == len({thing.cell for thing in layout.things})
        assert len({thing.cell for thing in layout.things}) == len(layout.things)


def test_things_are_as_their_kinds_say():
    for thing in (thing for layout in LAYOUTS for thing in layout.things):
        column, row = int(3 * thing.x), int(3 * thing.y)
        assert thing.cell == column + 3 * row
        smallest, largest = SIZES[thing.kind.size]
        assert smallest <= thing.radius <= largest
        assert max(abs(a - b) for a, b in zip(thing.rgb, COLOURS[thing.kind.colour], strict=True)) <= 12
        assert abs(sum(value * value for value in thing.angle) - 1) < 1e-5


def test_all_values_are_seen_and_often_shared():
    kinds = [[thing.kind for thing in layout.things] for layout in LAYOUTS]
    seen = Counter(value for some in kinds for kind in some for value in kind)
    assert all(seen[value] > 100 for values in ATTRIBUTES for value in values)
    # Two kinds share a shape in 1/6 of the cases by chance, and more often by design.
    shared = sum(some[0].shape == some[1].shape for some in kinds) / len(kinds)
    assert 0.25 < shared < 0.45

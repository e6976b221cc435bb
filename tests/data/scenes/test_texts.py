"""Texts of a scene are true of it, and phrases of nothing else; they are parsed without the code that wrote them."""

import itertools
import re
from collections import Counter
from random import Random

import pytest

from betaclip.data.scenes.layout import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, SIZES, TEXTURES, Kind, random_layout
from betaclip.data.scenes.texts import describe, noun
from betaclip.model.tokenizer import Tokenizer

COUNT = 1000
WORDS = (set(SIZES), set(PATTERNS), set(COLOURS), set(SHAPES) | {"shape"})
WHERE = {
    "in the upper left": lambda x, y: x < 1 / 3 and y < 1 / 3,
    "in the upper right": lambda x, y: x > 2 / 3 and y < 1 / 3,
    "in the lower left": lambda x, y: x < 1 / 3 and y > 2 / 3,
    "in the lower right": lambda x, y: x > 2 / 3 and y > 2 / 3,
    "in the center": lambda x, y: 0.4 < x < 0.6 and 0.4 < y < 0.6,
    "in the middle": lambda x, y: 0.4 < x < 0.6 and 0.4 < y < 0.6,
    "at the top": lambda x, y: y < 1 / 3,
    "at the bottom": lambda x, y: y > 2 / 3,
    "on the left": lambda x, y: x < 1 / 3,
    "on the right": lambda x, y: x > 2 / 3,
}
RELATIONS = {
    "left of": lambda a, b: b.x - a.x > 0.19,
    "right of": lambda a, b: a.x - b.x > 0.19,
    "above": lambda a, b: b.y - a.y > 0.19,
    "below": lambda a, b: a.y - b.y > 0.19,
}
LARGER = {"is larger than": lambda a, b: a.radius > 1.4 * b.radius}
NUMBERS = {"two": 2, "three": 3}


@pytest.fixture(scope="module")
def described():
    layouts = [(rng := Random(f"{i}"), random_layout(rng)) for i in range(COUNT)]
    return [(layout, *describe(layout, rng)) for rng, layout in layouts]


def fits(name: str, thing) -> bool:
    """Whether ``a large red star`` or ``the star at the top`` is true of a thing."""
    place = next((place for place in WHERE if name.endswith(f" {place}")), None)
    words = name.removesuffix(place or "").split()
    words = words[1:] if words[0] in ("a", "the") else words
    known = set(thing.kind) | {"shape"}
    assert words and all(any(word in words_ for words_ in WORDS) for word in words), name
    assert words[-1] in WORDS[3], name
    return set(words) <= known and (place is None or WHERE[place](thing.x, thing.y))


def meant(text: str, things, relations) -> list[tuple[int, ...]]:
    """The things, or the pairs, of which a text is true."""
    parts = next(([*text.split(f" {word} "), word] for word in relations if f" {word} " in text), None)
    if parts is None:
        return [(i,) for i, thing in enumerate(things) if fits(text, thing)]
    first, second, word = parts
    return [
        (i, j)
        for i, j in itertools.permutations(range(len(things)), 2)
        if fits(first, things[i]) and fits(second, things[j]) and relations[word](things[i], things[j])
    ]


def test_phrases_name_what_they_say(described):
    for layout, _, phrases in described:
        for text, things in phrases:
            assert meant(text, layout.things, RELATIONS) == [things], text


def test_phrases_are_of_all_kinds(described):
    texts = [phrase.text for _, _, phrases in described for phrase in phrases]
    for words in (*WHERE, *RELATIONS, *SHAPES, *COLOURS, *PATTERNS, *SIZES, "shape"):
        assert sum(f" {words} " in f" {text} " for text in texts) > 20, words
    assert not [text for text in texts if re.search(r"\ba [aeiou]", text)]


def test_names_are_short(described):
    """A name has one or two attributes, fewer with a place."""
    lengths, needs_place = Counter(), 0
    for layout, _, phrases in described:
        for text, things in phrases:
            name = re.sub(f" ({'|'.join(WHERE)})$", "", text)
            if text.startswith("the ") and len(things) == 1 and len(name.split()) < 5:
                lengths[len(name.split()) - (1 if name.endswith("shape") else 0) - 1] += 1
                needs_place += len(meant(name, layout.things, {})) > 1
    assert lengths[1] > 250 and lengths[2] > 250 and needs_place > 50
    assert set(lengths) == {1, 2}


def test_sentences_are_true(described):
    seen = set()
    for layout, sentences, _ in described:
        opening, *others = (_plain(sentence) for sentence in sentences)
        assert _is_true_opening(opening, layout), opening
        things, last = layout.things, None
        for text in others:
            form, true, last = _check(text, things, last)
            assert true, (text, sentences)
            seen.add(form)
    assert seen == {"placed", "there", "side", "it", "related", "both", "larger"}


def test_every_thing_is_told_once_before_it_is_compared(described):
    for layout, sentences, _ in described:
        told = " ".join(sentences[1 : 1 + len(layout.things)])
        for thing in layout.things:
            swapped = f"{thing.kind.size} {thing.kind.colour} {thing.kind.pattern} {thing.kind.shape}"
            assert len(re.findall(f"{' '.join(thing.kind)}|{swapped}", told, re.IGNORECASE)) == 1


def test_sizes(described):
    tokenizer = Tokenizer(1000)
    for _, sentences, phrases in described:
        assert len(tokenizer(" ".join(sentences))) <= 77
        assert max(len(tokenizer(phrase.text)) for phrase in phrases) <= 20
        assert 3 <= len(sentences) <= 6 and 2 <= len(phrases) <= 12
        assert len({phrase.text for phrase in phrases}) == len(phrases) and len(set(sentences)) == len(sentences)


def test_noun():
    kind = Kind("large", "striped", "yellow", "star")
    assert noun(kind) == "large striped yellow star"
    assert noun(kind, 0b1110, colour_first=True) == "yellow striped star"
    assert noun(kind, 0b1001, colour_first=True) == "large star"
    assert noun(kind, 0b0110) == "striped yellow shape"


def _plain(sentence: str) -> str:
    assert sentence[0].isupper() and sentence.endswith(".") and ".." not in sentence
    return sentence[0].lower() + sentence[1:-1]


def _is_true_opening(text: str, layout) -> bool:
    number, texture, background = re.search(
        rf"^(?=.*\b({'|'.join(NUMBERS)}) (?:shapes|objects)\b).*\ba ({'|'.join(TEXTURES)}) "
        rf"({'|'.join(BACKGROUNDS)}) background\b",
        text,
    ).groups()
    return (NUMBERS[number], texture, background) == (len(layout.things), layout.texture, layout.background)


def _check(text: str, things, last):
    """Parse a sentence: its form, whether it is true, and the thing that "it" means in the next one."""
    if found := re.match(r"to its (left|right) is (.+)", text):
        return "side", *_one(meant(found[2], things, {}), RELATIONS[f"{found[1]} of"], things, last)
    if found := re.match(r"(above|below) it is (.+)", text):
        return "it", *_one(meant(found[2], things, {}), RELATIONS[found[1]], things, last)
    if found := re.match(r"the (.+) and the (.+) are both (\w+)", text):
        pair = [meant(name, things, {}) for name in found.groups()[:2]]
        unique = all(len(one) == 1 for one in pair) and pair[0] != pair[1]
        return "both", unique and all(found[3] in things[one[0][0]].kind for one in pair), None
    if " is larger than " in text:
        return "larger", len(meant(text, things, LARGER)) == 1, None
    if found := re.match(r"(.+) is (?:to the )?(left of|right of|above|below) (.+)", text):
        pairs = meant(f"{found[1]} {found[2]} {found[3]}", things, RELATIONS)
        return "related", len(pairs) == 1, pairs[0][0] if pairs else None
    if found := re.match(rf"({'|'.join(WHERE)}) is (.+)", text):
        there, name = found.groups()
        one = meant(f"{name} {there}", things, {})
        return "there", len(one) == 1, one[0][0] if one else None
    one = meant(re.sub(" (is|sits) ", " ", text), things, {})
    return "placed", len(one) == 1, one[0][0] if one else None


def _one(found, relation, things, last):
    return len(found) == 1 and relation(things[found[0][0]], things[last]), found[0][0] if found else None

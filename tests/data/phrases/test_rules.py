"""Phrases by word lists: in sentences written for these tests, and their properties in realistic captions."""

import json

import pytest
from support.paths import ROOT

from betaclip.data.phrases.rules import RuleExtractor, find_spans
from betaclip.data.phrases.spans import NOUN, SPATIAL, VERB, cut_phrases
from betaclip.data.sentences import split_sentences

KINDS = {NOUN: "noun", VERB: "verb", SPATIAL: "spatial"}


def found(sentence):
    return [(phrase.text, KINDS[phrase.kind]) for phrase in cut_phrases(sentence, find_spans(sentence))]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "A man is leaning against an old stone wall",
            [("A man", "noun"), ("against an old stone wall", "spatial")],
        ),
        (
            "On the left side of the table, a green bottle stands next to two glasses",
            [
                ("On the left side of the table", "spatial"),
                ("a green bottle", "noun"),
                ("next to two glasses", "spatial"),
            ],
        ),
        (
            "A red mug on the right of the sink is filled with hot coffee",
            [("A red mug on the right of the sink", "noun"), ("filled with", "verb"), ("hot coffee", "noun")],
        ),
        (
            "Two boys wearing striped shirts run toward the gate, leaving footprints in the wet sand",
            [
                ("Two boys", "noun"), ("striped shirts", "noun"), ("toward the gate", "spatial"),
                ("footprints", "noun"), ("the wet sand", "noun"),
            ],
        ),
        (
            "She is looking at a carefully folded letter, and the room is quiet and dark",
            [("looking at", "verb"), ("a carefully folded letter", "noun"), ("the room", "noun")],
        ),
        (
            "The dog's collar has bright yellow letters on it",
            [("The dog's collar", "noun"), ("bright yellow letters", "noun")],
        ),
        ("The image captures a dense forest", [("a dense forest", "noun")]),
        (
            "A clerk is handing her some coins, trying to block the light in front of him",
            [("A clerk", "noun"), ("some coins", "noun"), ("the light", "noun")],
        ),
        (
            "On the left of it, rain falls on top of a shed",
            [("On the left", "spatial"), ("rain", "noun"), ("on top of a shed", "spatial")],
        ),
        ("In this photo, it is raining", []),
        ("", []),
        ("...", []),
    ],
)  # fmt: skip
def test_sentences(sentence, expected):
    assert found(sentence) == expected


def test_spans_are_of_the_sentence_and_apart():
    sentence = "A woman — smiling – holds “café” signs, 3 red balloons; ça va"
    last = 0
    for span in find_spans(sentence):
        assert last <= span.begin < span.end <= len(sentence)
        assert sentence[span.begin : span.end].strip() == sentence[span.begin : span.end]
        last = span.end
    assert ("3 red balloons", "noun") in found(sentence)


def test_extractor_cuts_endless_sentences():
    extractor = RuleExtractor()
    first, endless = extractor(["A cat sits", "a red ball and " * 6000])
    assert len(first) == 1
    assert len(endless) == 65_535 // 15 and endless[-1].end <= 65_535


def test_realistic_captions():
    captions = json.loads((ROOT / "benchmarks" / "captions.json").read_text())["captions"]
    sentences = [sentence for caption in captions for sentence in split_sentences(caption)]
    phrases = [phrase for sentence in sentences for phrase in cut_phrases(sentence, find_spans(sentence))]
    words = [len(phrase.text.split()) for phrase in phrases]
    assert 45 < len(phrases) / len(captions) < 60
    assert 2.4 < sum(words) / len(words) < 3.0 and max(words) < 13
    # What a noun phrase must not contain: a verb that its list knows by its form.
    nouns = [phrase.text.lower().split() for phrase in phrases if phrase.kind == NOUN]
    finite = [noun for noun in nouns if {"is", "are", "has", "captures", "hangs", "extends"} & set(noun)]
    assert finite == []

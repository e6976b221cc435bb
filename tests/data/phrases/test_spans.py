"""The choice of spans, and the phrases that are cut out by them."""

import pytest

from betaclip.data.phrases.spans import (
    NOUN,
    SPATIAL,
    VERB,
    Phrase,
    Span,
    cut_phrases,
    drop_overlaps,
    is_blacklisted,
    select_spans,
)


def test_cut_phrases():
    assert cut_phrases("A cat sits on a mat", [Span(0, 5, NOUN), Span(6, 13, VERB)]) == [
        Phrase("A cat", NOUN),
        Phrase("sits on", VERB),
    ]


def test_drop_overlaps():
    spans = [Span(0, 5, NOUN), Span(0, 9, SPATIAL), Span(7, 12, VERB), Span(9, 12, NOUN), Span(20, 22, NOUN)]
    assert drop_overlaps(spans) == [Span(0, 9, SPATIAL), Span(9, 12, NOUN), Span(20, 22, NOUN)]
    assert drop_overlaps([Span(5, 12, NOUN), Span(3, 7, NOUN), Span(1, 5, VERB)]) == [
        Span(1, 5, VERB),
        Span(5, 12, NOUN),
    ]
    assert drop_overlaps([Span(3, 6, VERB), Span(0, 3, NOUN), Span(2, 5, NOUN)]) == [Span(0, 3, NOUN), Span(3, 6, VERB)]


@pytest.mark.parametrize("phrase", ["The image", "this Photo", "the overall mood", "the scene", "The", "its view"])
def test_blacklisted(phrase):
    assert is_blacklisted(phrase)


@pytest.mark.parametrize("phrase", ["a picture frame", "the image on the wall", "in the background", "a red mug"])
def test_not_blacklisted(phrase):
    assert not is_blacklisted(phrase)


def test_select_spans_drops_the_blacklisted_last():
    sentence = "the image on the wall"
    assert select_spans(sentence, [Span(0, 9, NOUN), Span(0, 21, NOUN)]) == [Span(0, 21, NOUN)]
    assert select_spans(sentence, [Span(0, 9, NOUN), Span(13, 21, NOUN)]) == [Span(13, 21, NOUN)]

"""What all extractors of phrases share, and which of them is taken."""

import logging

import pytest

from betaclip.data.phrases import extraction as phrases
from betaclip.data.phrases.extraction import (
    NOUN,
    SPATIAL,
    VERB,
    Span,
    create_extractor,
    finish,
    is_blacklisted,
    longest,
)
from betaclip.data.phrases.rules import RuleExtractor


def test_longest():
    spans = [Span(0, 5, NOUN), Span(0, 9, SPATIAL), Span(7, 12, VERB), Span(9, 12, NOUN), Span(20, 22, NOUN)]
    assert longest(spans) == [Span(0, 9, SPATIAL), Span(9, 12, NOUN), Span(20, 22, NOUN)]
    assert longest([Span(5, 12, NOUN), Span(3, 7, NOUN), Span(1, 5, VERB)]) == [Span(1, 5, VERB), Span(5, 12, NOUN)]
    assert longest([Span(3, 6, VERB), Span(0, 3, NOUN), Span(2, 5, NOUN)]) == [Span(0, 3, NOUN), Span(3, 6, VERB)]


@pytest.mark.parametrize("phrase", ["The image", "this Photo", "the overall mood", "the scene", "The", "its view"])
def test_blacklisted(phrase):
    assert is_blacklisted(phrase)


@pytest.mark.parametrize("phrase", ["a picture frame", "the image on the wall", "in the background", "a red mug"])
def test_not_blacklisted(phrase):
    assert not is_blacklisted(phrase)


def test_finish_drops_after_choosing():
    sentence = "the image on the wall"
    assert finish(sentence, [Span(0, 9, NOUN), Span(0, 21, NOUN)]) == [Span(0, 21, NOUN)]
    assert finish(sentence, [Span(0, 9, NOUN), Span(13, 21, NOUN)]) == [Span(13, 21, NOUN)]


def test_without_a_spacy_model(monkeypatch, caplog):
    monkeypatch.setattr(phrases, "SPACY_MODELS", ("no_such_model",))
    with caplog.at_level(logging.WARNING):
        assert isinstance(create_extractor(), RuleExtractor)
    (record,) = caplog.records
    assert "no spaCy model is installed" in record.message
    assert "python -m spacy download no_such_model" in record.message


def test_rejects_a_model_that_is_not_installed():
    with pytest.raises(ValueError, match=r"spacy_model: 'no_such_model' is not installed \(python -m spacy download"):
        create_extractor("no_such_model")

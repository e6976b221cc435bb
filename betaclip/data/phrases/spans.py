"""What all extractors of phrases share: marks in a sentence, and which of them are kept.

An extractor marks spans of characters. Spans, not texts, are what ``betaclip prepare`` writes to a file
(``betaclip.data.phrases.cache``).
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

from betaclip.data.phrases.words import BLACKLIST, POINTERS

# Which phrases there are: the longest of overlapping ones, or those of the published code.
PhraseStyle = Literal["longest", "published"]

NOUN, VERB, SPATIAL = range(3)  # noun phrases, verbs with their prepositions, spatial phrases
MAX_SENTENCE_CHARS = 65_535  # a cache holds spans in 16 bits; extractors do not look at what comes after


class Span(NamedTuple):
    """Characters ``begin`` to ``end`` of a sentence, and the kind of phrase that they are."""

    begin: int
    end: int
    kind: int


class Phrase(NamedTuple):
    text: str
    kind: int


class Extractor(Protocol):
    name: str  # with its version: a cache records which extractor made it
    style: PhraseStyle

    def __call__(self, sentences: Iterable[str]) -> Iterator[list[Span]]:
        """The spans of each sentence, in order of their beginnings."""


def cut_phrases(sentence: str, spans: Iterable[Span]) -> list[Phrase]:
    """The phrases that the spans mark."""
    return [Phrase(sentence[span.begin : span.end], span.kind) for span in spans]


def select_spans(sentence: str, spans: Iterable[Span]) -> list[Span]:
    """The longest of overlapping spans, without those that speak of the picture itself.

    Every extractor of the style "longest" ends with this.
    """
    return [span for span in drop_overlaps(spans) if not is_blacklisted(sentence[span.begin : span.end])]


def drop_overlaps(spans: Iterable[Span]) -> list[Span]:
    """The longest of overlapping spans, the first of equally long ones; in order of their beginnings."""
    kept: list[Span] = []
    taken = bytearray()  # by character
    for span in sorted(spans, key=lambda span: (span.begin - span.end, span.begin)):
        if taken.find(1, span.begin, span.end) < 0:
            kept.append(span)
            taken.extend(bytes(max(0, span.end - len(taken))))
            taken[span.begin : span.end] = b"\1" * (span.end - span.begin)
    return sorted(kept)


def is_blacklisted(phrase: str) -> bool:
    """Whether all words but determiners speak of the picture itself; case does not matter."""
    words = [word for word in phrase.lower().split() if word not in POINTERS]
    return all(word in BLACKLIST for word in words)

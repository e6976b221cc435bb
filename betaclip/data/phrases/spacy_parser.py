"""Finds phrases in spaCy's parse of a sentence."""

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from betaclip.data.phrases import words as lists
from betaclip.data.phrases.spans import MAX_SENTENCE_CHARS, NOUN, SPATIAL, VERB, PhraseStyle, Span, select_spans

_PUBLISHED_BLACKLIST = ("the", "the image", "image")  # whole phrases, in this case


class SpacyExtractor:
    """Finds phrases with the tagger and the parser of a spaCy model, given by its name or folder."""

    def __init__(self, model: str, style: PhraseStyle = "longest") -> None:
        import spacy

        self.model, self.style = model, style
        self._find = find_published_spans if style == "published" else find_spans
        self.pipeline = spacy.load(model, exclude=["ner", "lemmatizer"])
        self.name = f"spacy {version('spacy')}, {model} {self.pipeline.meta['version']}, rules 1"

    def __reduce__(self) -> tuple[type["SpacyExtractor"], tuple[str, PhraseStyle]]:
        return SpacyExtractor, (self.model, self.style)  # a worker that was spawned loads the model itself

    def __call__(self, sentences: Iterable[str]) -> Iterator[list[Span]]:
        for doc in self.pipeline.pipe((sentence[:MAX_SENTENCE_CHARS] for sentence in sentences), batch_size=256):
            yield self._find(doc)


def find_spans(doc: Any) -> list[Span]:
    """The phrases of a ``spacy.tokens.Doc`` that has parts of speech and dependencies:

    * noun chunks, but no pronouns, extended by a spatial phrase that follows and belongs to them:
      ``a red mug on the left of the sink``;
    * spatial phrases: ``on the left side of the street``, ``next to the window``, ``behind the sofa``;
    * a verb and the preposition or particle after it: ``leaning against``, ``picks up``.

    The longest of overlapping phrases is kept.
    """
    chunks = {chunk.start: chunk for chunk in doc.noun_chunks if chunk.root.pos_ != "PRON"}
    spatial = {token.i: end for token in doc if (end := _spatial_end(token, chunks)) is not None}
    found = [(begin, end, SPATIAL) for begin, end in spatial.items()]
    for chunk in chunks.values():
        if len(chunk) > 1 or chunk.root.lower_ not in lists.PLACES:
            found.append((chunk.start, chunk.end, NOUN))
        end = spatial.get(chunk.end)
        if end is not None and any(token.head == chunk.root for token in doc[chunk.end : end]):
            found.append((chunk.start, end, NOUN))
    found += _verbs(doc)
    return select_spans(doc.text, _characters(doc, found))


def find_published_spans(doc: Any) -> list[Span]:
    """The phrases that the published code finds, as far as its output tells, in order of their beginnings:

    * noun chunks with their pronouns, and nouns or adjectives with a spatial phrase that follows them (``the window on
      the left``); the longest of those that overlap;
    * a verb and the preposition or particle after it;
    * spatial phrases up to the word that names the place (``in front of``, ``on the left``), and ``next to``.

    Phrases of different kinds may overlap. Only three phrases are blacklisted, if they are written in lower case.
    """
    from spacy.util import filter_spans

    places = [(token.i, end) for token in doc if (end := _published_place_end(token)) is not None]
    extended = [doc[begin:end] for place, end in places if (begin := _begin_of_noun(doc, place)) is not None]
    found = [(span.start, span.end, NOUN) for span in filter_spans([*doc.noun_chunks, *extended])]
    found += _verbs(doc)
    found += [(begin, end, SPATIAL) for begin, end in places]
    found += [(a.i, b.i + 1, SPATIAL) for a, b in pairwise(doc) if (a.lower_, b.lower_) == ("next", "to")]
    spans = sorted(_characters(doc, found))
    return [span for span in spans if doc.text[span.begin : span.end] not in _PUBLISHED_BLACKLIST]


def _characters(doc: Any, found: Iterable[tuple[int, int, int]]) -> Iterator[Span]:
    """Spans of characters from begin, end and kind in tokens."""
    for begin, end, kind in found:
        yield Span(doc[begin].idx, doc[end - 1].idx + len(doc[end - 1]), kind)


def _verbs(doc: Any) -> list[tuple[int, int, int]]:
    return [(a.i, b.i + 1, VERB) for a, b in pairwise(doc) if a.pos_ == "VERB" and b.pos_ == "ADP"]


def _published_place_end(token: Any) -> int | None:
    """The end of ``in front of``, ``on the left`` and the like, if one begins with ``token``."""
    if token.pos_ != "ADP":
        return None
    doc, place = token.doc, token.i + 1
    if place < len(doc) and doc[place].pos_ == "DET":
        place += 1
    if place == len(doc) or doc[place].lower_ not in lists.PUBLISHED_PLACES:
        return None
    return place + 2 if place + 1 < len(doc) and doc[place + 1].lower_ == "of" else place + 1


def _begin_of_noun(doc: Any, end: int) -> int | None:
    """The begin of the nouns before a spatial phrase, with their adjectives and determiner; None if there are none."""
    begin = end
    for kind in ("NOUN", "ADJ"):
        while begin and doc[begin - 1].pos_ == kind:
            begin -= 1
    if begin == end:
        return None
    return begin - 1 if begin and doc[begin - 1].pos_ == "DET" else begin


def _spatial_end(token: Any, chunks: dict[int, Any]) -> int | None:
    """The end of the spatial phrase that begins with ``token``, or None. chunks: noun chunks by their first token."""
    doc, place = token.doc, token.i + 1
    if token.lower_ in lists.BEFORE_TO and place < len(doc) and doc[place].lower_ == "to":
        chunk = chunks.get(place + 1)
        return chunk.end if chunk else None
    chunk = chunks.get(place)
    if chunk is None or token.pos_ != "ADP" or token.lower_ not in lists.PLACE_PREPOSITIONS:
        return None
    if chunk.root.lower_ in lists.PLACES:
        if chunk.end == len(doc) or doc[chunk.end].lower_ != "of":
            return chunk.end
        if whole := chunks.get(chunk.end + 1):
            return whole.end
        # "On the left of it" says something without "it", "in front of it" does not.
        return chunk.end if len(chunk) > 1 else None
    return chunk.end if token.lower_ in lists.SPATIAL_PREPOSITIONS else None

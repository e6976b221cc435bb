"""Finds phrases in spaCy's parse of a sentence."""

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from betaclip.data.phrases import words as lists
from betaclip.data.phrases.spans import MAX_SENTENCE_CHARS, NOUN, SPATIAL, VERB, Span, select_spans


class SpacyExtractor:
    """Finds phrases with the tagger and the parser of a spaCy model, given by its name or folder."""

    def __init__(self, model: str) -> None:
        import spacy

        self.model = model
        self.pipeline = spacy.load(model, exclude=["ner", "lemmatizer"])
        self.name = f"spacy {version('spacy')}, {model} {self.pipeline.meta['version']}, rules 1"

    def __reduce__(self) -> tuple[type["SpacyExtractor"], tuple[str]]:
        return SpacyExtractor, (self.model,)  # a worker that was spawned loads the model itself

    def __call__(self, sentences: Iterable[str]) -> Iterator[list[Span]]:
        for doc in self.pipeline.pipe((sentence[:MAX_SENTENCE_CHARS] for sentence in sentences), batch_size=256):
            yield find_spans(doc)


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
    for token, following in pairwise(doc):
        if token.pos_ == "VERB" and following.pos_ == "ADP":
            found.append((token.i, following.i + 1, VERB))
    characters = [(doc[begin].idx, doc[end - 1].idx + len(doc[end - 1]), kind) for begin, end, kind in found]
    return select_spans(doc.text, (Span(*span) for span in characters))


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

"""Makes the hierarchy of a caption: the caption itself, its sentences, their phrases."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from betaclip.data.batches import CAPTION, PHRASE, SENTENCE
from betaclip.data.phrases.spans import NOUN, SPATIAL, Phrase, PhraseStyle
from betaclip.data.sentences import clean, join_sentences, split_sentences

SentenceOrder = Literal["caption", "random"]


def hierarchy(
    caption: str,
    phrases: Callable[[str], Sequence[Phrase]],
    rng: random.Random,
    *,
    sentences: int = 5,
    max_phrases: int = 30,
    fits: Callable[[str], bool] = lambda phrase: True,
    phrase_style: PhraseStyle = "longest",
    sentence_order: SentenceOrder = "caption",
) -> tuple[list[str], list[int]]:
    """The texts of a caption and their levels, CAPTION, SENTENCE or PHRASE.

    Sentences are sampled without replacement; if there are too few, all are taken. The first text is these sentences,
    joined; the phrases are those of these sentences.

    Args:
        phrases: gives the phrases of a sentence.
        rng: samples the sentences, and nothing else.
        sentences: how many to sample.
        max_phrases: how many phrases to keep at most.
        fits: whether a phrase is short enough.
        phrase_style: which phrases count as equal, and which come first.
        sentence_order: "caption", the order that they have there; or "random", as in the released code.

    Returns:
        At most 1 + sentences + max_phrases texts, and none if the caption has no words.
    """
    parts = split_sentences(clean(caption))
    if sentence_order == "random":
        parts = rng.sample(parts, min(len(parts), sentences))
    elif len(parts) > sentences:
        parts = [parts[i] for i in sorted(rng.sample(range(len(parts)), sentences))]
    if not parts:
        return [], []
    found = (phrase for part in parts for phrase in phrases(part) if fits(phrase.text))
    distinct = published_phrases(found) if phrase_style == "published" else distinct_phrases(found)
    chosen = distinct[:max_phrases]
    texts = [join_sentences(parts), *parts, *chosen]
    return texts, [CAPTION] + [SENTENCE] * len(parts) + [PHRASE] * len(chosen)


def distinct_phrases(phrases: Iterable[Phrase]) -> list[str]:
    """Each phrase once, whatever its case, with noun phrases first, so that a limit drops other phrases first."""
    distinct: dict[str, Phrase] = {}
    for phrase in phrases:
        distinct.setdefault(phrase.text.lower(), phrase)
    return [phrase.text for phrase in sorted(distinct.values(), key=lambda phrase: phrase.kind != NOUN)]


def published_phrases(phrases: Iterable[Phrase]) -> list[str]:
    """Each phrase once: noun phrases, then verbs, then spatial phrases; only the last are put in lower case."""
    texts = (
        phrase.text.lower() if phrase.kind == SPATIAL else phrase.text
        for phrase in sorted(phrases, key=lambda phrase: phrase.kind)
    )
    return list(dict.fromkeys(texts))

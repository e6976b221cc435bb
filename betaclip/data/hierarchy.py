"""Makes the hierarchy of a caption: the caption itself, its sentences, their phrases."""

import random
from collections.abc import Callable, Iterable, Sequence

from betaclip.data.batches import CAPTION, PHRASE, SENTENCE
from betaclip.data.phrases.spans import NOUN, Phrase
from betaclip.data.sentences import clean, join_sentences, split_sentences


def hierarchy(
    caption: str,
    phrases: Callable[[str], Sequence[Phrase]],
    rng: random.Random,
    *,
    sentences: int = 5,
    max_phrases: int = 30,
    fits: Callable[[str], bool] = lambda phrase: True,
) -> tuple[list[str], list[int]]:
    """The texts of a caption and their levels, CAPTION, SENTENCE or PHRASE.

    Sentences are sampled without replacement and keep their order; if there are too few, all are taken. The first text
    is these sentences, joined; the phrases are those of these sentences.

    Args:
        phrases: gives the phrases of a sentence.
        rng: samples the sentences, and nothing else.
        sentences: how many to sample.
        max_phrases: how many phrases to keep at most.
        fits: whether a phrase is short enough.

    Returns:
        At most 1 + sentences + max_phrases texts, and none if the caption has no words.
    """
    parts = split_sentences(clean(caption))
    if len(parts) > sentences:
        parts = [parts[i] for i in sorted(rng.sample(range(len(parts)), sentences))]
    if not parts:
        return [], []
    chosen = distinct_phrases((phrase for part in parts for phrase in phrases(part) if fits(phrase.text)), max_phrases)
    texts = [join_sentences(parts), *parts, *chosen]
    return texts, [CAPTION] + [SENTENCE] * len(parts) + [PHRASE] * len(chosen)


def distinct_phrases(phrases: Iterable[Phrase], max_phrases: int) -> list[str]:
    """Each phrase once, whatever its case, with noun phrases first, so that the limit drops other phrases first."""
    distinct: dict[str, Phrase] = {}
    for phrase in phrases:
        distinct.setdefault(phrase.text.lower(), phrase)
    return [phrase.text for phrase in sorted(distinct.values(), key=lambda phrase: phrase.kind != NOUN)][:max_phrases]

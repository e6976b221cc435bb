"""Makes the hierarchy of a caption: the caption itself, its sentences, their phrases."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from betaclip.data.batches import CAPTION, PHRASE, SENTENCE
from betaclip.data.phrases.spans import NOUN, Phrase

_MAX_CLAUSE = 50  # words; captioners get stuck on a clause or a sentence, hardly on anything longer


def clean(caption: str) -> str:
    """The caption on one line, with single blanks, and repeated words (``a dog, a dog, a dog``) only once."""
    kept: list[str] = []
    keys: list[str] = []
    places: defaultdict[str, list[int]] = defaultdict(list)  # where each key is in keys
    for word in caption.split():
        key = word.rstrip(".,;:") or word  # ``a dog, a dog.`` is a run too
        places[key].append(len(keys))
        kept.append(word)
        keys.append(key)
        if length := _repeated(keys, places[key]):
            for repeated in keys[-length:]:
                places[repeated].pop()
            kept[-2 * length :] = kept[-length:]
            del keys[-length:]
    return " ".join(kept)


def _repeated(keys: list[str], places: list[int]) -> int:
    """How many of the last words repeat the words before them, the fewest that do; or 0.

    places: where the last word is in ``keys``.
    """
    for place in reversed(places[:-1]):
        length = places[-1] - place
        if length > min(_MAX_CLAUSE, len(keys) // 2):
            break
        if keys[-length:] == keys[-2 * length : -length]:
            return length
    return 0


def split_sentences(caption: str) -> list[str]:
    """The parts of a clean caption between ``". "``, each without its closing full stops; empty ones dropped."""
    return [sentence for part in caption.split(". ") if (sentence := part.rstrip(" .").lstrip())]


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
    is these sentences joined by ``". "``. Unlike in the published code, a sentence has lost its own full stop, so that
    two are never joined by ``".."``. The phrases are those of the sampled sentences.

    Args:
        phrases: gives the phrases of a sentence.
        rng: samples the sentences, and nothing else.
        sentences: how many to sample.
        max_phrases: how many phrases to keep at most.
        fits: tells whether a phrase is short enough.

    Returns:
        At most 1 + sentences + max_phrases texts, and none if the caption has no words.
    """
    parts = split_sentences(clean(caption))
    if len(parts) > sentences:
        parts = [parts[i] for i in sorted(rng.sample(range(len(parts)), sentences))]
    if not parts:
        return [], []
    chosen = distinct_phrases((phrase for part in parts for phrase in phrases(part) if fits(phrase.text)), max_phrases)
    texts = [". ".join(parts), *parts, *chosen]
    return texts, [CAPTION] + [SENTENCE] * len(parts) + [PHRASE] * len(chosen)


def distinct_phrases(phrases: Iterable[Phrase], max_phrases: int) -> list[str]:
    """Each phrase once, whatever its case, and noun phrases first, so that they are the last that the limit drops."""
    distinct: dict[str, Phrase] = {}
    for phrase in phrases:
        distinct.setdefault(phrase.text.lower(), phrase)
    return [phrase.text for phrase in sorted(distinct.values(), key=lambda phrase: phrase.kind != NOUN)][:max_phrases]

"""Caption to hierarchy of texts: the caption, its sentences, its phrases."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from betaclip.data.batches import CAPTION, PHRASE, SENTENCE
from betaclip.data.phrases.spans import NOUN, Phrase

_LONGEST_RUN = 50  # words; captioners get stuck on a clause or a sentence, hardly on more


def clean(caption: str) -> str:
    """On one line, each blank single, and of a run of the same words (``a dog, a dog, a dog``) only the last."""
    kept: list[str] = []
    keys: list[str] = []
    places: defaultdict[str, list[int]] = defaultdict(list)  # of each key in keys
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
    """The smallest number of last words that repeat the words before them, or 0. places: of the last word."""
    for place in reversed(places[:-1]):
        length = places[-1] - place
        if length > min(_LONGEST_RUN, len(keys) // 2):
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
    """Texts of a caption and their levels (0 caption, 1 sentence, 2 phrase): at most 1 + sentences + max_phrases.

    The sentences are sampled without replacement and stay in their order; all are taken if there are not more. The text
    of level 0 is these sentences joined by ``". "``; unlike in the published code a sentence has lost its own full
    stop, so that the joint is never ``".."``. The phrases are those of the sampled sentences.

    Args:
        phrases: of a sentence.
        rng: draws the sentences, nothing else.
        fits: whether a phrase is short enough.

    Returns:
        ([], []) if the caption has no words.
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
    """Each phrase once, whatever its case; noun phrases before the others, so that a limit drops the others first."""
    distinct: dict[str, Phrase] = {}
    for phrase in phrases:
        distinct.setdefault(phrase.text.lower(), phrase)
    return [phrase.text for phrase in sorted(distinct.values(), key=lambda phrase: phrase.kind != NOUN)][:max_phrases]

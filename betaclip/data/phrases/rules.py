"""Phrases by word lists, for machines without a spaCy model.

Words are told apart by closed lists (determiners, prepositions, conjunctions, pronouns, auxiliaries), verbs by their
endings, a list of those that captions use, and their neighbours. What lies between such words is a noun phrase.
Made for captions of pictures, in English; on anything else it is a guess.
"""

import re
from collections.abc import Iterable, Iterator

from betaclip.data.phrases import words as lists
from betaclip.data.phrases.spans import MAX_SENTENCE_CHARS, NOUN, SPATIAL, VERB, Span, select_spans

_WORD = re.compile(r"\w+(?:[-'’/.]\w+)*|[^\w\s]")
_DETERMINER, _PREPOSITION, _BREAK, _AUXILIARY, _MARK, _VERB, _WORD_TAG = range(7)


class RuleExtractor:
    """Needs nothing installed."""

    name = "betaclip rules 1"

    def __call__(self, sentences: Iterable[str]) -> Iterator[list[Span]]:
        for sentence in sentences:
            yield find_spans(sentence[:MAX_SENTENCE_CHARS])


def find_spans(sentence: str) -> list[Span]:
    """The kinds of ``spacy_parser.find_spans``; a spatial phrase belongs to the noun phrase before it."""
    tokens = list(_WORD.finditer(sentence))
    words = [token.group().lower() for token in tokens]
    tags = tag(words)
    chunks = dict(_chunks(words, tags))
    spatial = {i: end for i in range(len(words)) if (end := _spatial_end(i, words, chunks)) is not None}
    found = [(begin, end, SPATIAL) for begin, end in spatial.items()]
    for begin, end in chunks.items():
        if end > begin + 1 or words[begin] not in lists.PLACES:
            found += [(begin, end, NOUN), (begin, spatial.get(end, end), NOUN)]
    for i in range(len(words) - 1):
        infinitive = tags[i + 1 : i + 3] == [_PREPOSITION, _VERB]  # "trying to block"
        if tags[i : i + 2] == [_VERB, _PREPOSITION] and not infinitive:
            found.append((i, i + 2, VERB))
    return select_spans(sentence, (Span(tokens[i].start(), tokens[j - 1].end(), kind) for i, j, kind in found))


def tag(words: list[str]) -> list[int]:
    """The class of each lower-case word of a sentence, in one pass from the left."""
    tags = [_closed_class(word) for word in words]
    for i, word in enumerate(words):
        previous, before = (words[i - 1], tags[i - 1]) if i else ("", _MARK)
        following, after = (words[i + 1], tags[i + 1]) if i + 1 < len(words) else ("", _MARK)
        if previous in lists.ARTICLES and tags[i] in (_PREPOSITION, _BREAK):
            tags[i] = _WORD_TAG  # "the far end", "a neatly folded towel"
        elif (word == "her" and after == _DETERMINER) or (word == "full" and following == "of"):
            tags[i] = _BREAK
        elif tags[i] == _WORD_TAG and _is_verb(word, previous, before, following, after):
            tags[i] = _VERB
    return tags


def _closed_class(word: str) -> int:
    if word in lists.DETERMINERS or word.isdigit():
        return _DETERMINER
    if word in lists.AUXILIARIES:
        return _AUXILIARY
    if word in lists.BREAKS or (word.endswith("ly") and word not in lists.NOT_ADVERBS):
        return _BREAK
    if word in lists.PREPOSITIONS:
        return _PREPOSITION
    return _WORD_TAG if word[0].isalnum() else _MARK


def _is_verb(word: str, previous: str, before: int, following: str, after: int) -> bool:
    """Whether a word of no closed class is a verb, from its form and its neighbours with their classes."""
    if word in lists.NOT_PARTICIPLES:
        return False
    if word.endswith("ing"):
        if before in (_AUXILIARY, _BREAK) or previous == "," or (word in lists.TRANSITIVE and before != _DETERMINER):
            return True
        return after != _WORD_TAG and before != _DETERMINER and not (before == after == _PREPOSITION)
    if (word.endswith("ed") and not word.endswith("eed")) or word in lists.PARTICIPLES:
        if before in (_AUXILIARY, _BREAK) and after != _WORD_TAG:
            return True
        return before != _DETERMINER and after in (_PREPOSITION, _BREAK, _DETERMINER)
    bases = _bases(word)
    known = not bases.isdisjoint(lists.VERBS)
    if not known and bases.isdisjoint(lists.NOUN_VERBS):
        return False
    if previous == "to" or before == _AUXILIARY:
        return following != "of"
    if before in (_DETERMINER, _PREPOSITION, _MARK) or following == "of":
        return False
    if previous in ("that", "which", "who") or (before == _WORD_TAG and after == _DETERMINER):
        return True
    plural = (previous.endswith("s") and not previous.endswith("ss")) or previous in lists.PLURALS
    singular_verb = word.endswith("s")  # "the boy runs", but "the boys run"
    if known:
        return (singular_verb or plural) and after in (_PREPOSITION, _BREAK, _WORD_TAG, _MARK)
    return plural and not singular_verb and after == _PREPOSITION


def _bases(word: str) -> set[str]:
    """What the verb may be of which a word is the third person, or the word itself."""
    if not word.endswith("s") or word.endswith("ss"):
        return {word}
    stem = word[:-1]
    bases = {stem}
    if stem.endswith("ie"):
        bases.add(stem[:-2] + "y")
    elif stem.endswith("e"):
        bases.add(stem[:-1])
    return bases


def _chunks(words: list[str], tags: list[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each noun phrase: determiners and the words after them, but not adjectives alone after "is"."""
    begin = 0
    while begin < len(tags):
        head = begin
        while head < len(tags) and tags[head] == _DETERMINER:
            head += 1
        end = head
        while end < len(tags) and tags[end] == _WORD_TAG:
            end += 1
        if end > head and not (head == begin and _is_predicate(words, tags, begin)):
            yield begin, end
        begin = max(end, begin + 1)


def _is_predicate(words: list[str], tags: list[int], begin: int) -> bool:
    """Whether what begins there without a determiner follows "is" or its like: "is warm and very dry"."""
    if begin and tags[begin - 1] == _VERB:  # "is painting bowls", unlike "is painted and dry"
        return False
    while begin and tags[begin - 1] in (_BREAK, _VERB, _WORD_TAG):
        begin -= 1
    return begin > 0 and tags[begin - 1] == _AUXILIARY and words[begin - 1] not in lists.HAVE


def _spatial_end(i: int, words: list[str], chunks: dict[int, int]) -> int | None:
    """Where the spatial phrase ends that begins with word i, or None."""
    if words[i] in lists.BEFORE_TO and words[i + 1 : i + 2] == ["to"]:
        return chunks.get(i + 2)
    end = chunks.get(i + 1)
    if end is None or words[i] not in lists.PLACE_PREPOSITIONS:
        return None
    if words[end - 1] in lists.PLACES:
        alone = None if end == i + 2 else end  # "on the left of it" says something without "it", "in front of it" not
        return chunks.get(end + 1, alone) if words[end : end + 1] == ["of"] else end
    return end if words[i] in lists.SPATIAL_PREPOSITIONS else None

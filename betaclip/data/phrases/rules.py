"""Phrases by word lists, for machines without a spaCy model.

Closed lists tell determiners, prepositions, conjunctions, pronouns and auxiliaries; verbs are told by their endings, by
lists of those that captions use, and by their neighbours. The words between these are noun phrases. The lists are made
for English captions of pictures; anything else is a guess.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from betaclip.data.phrases import words as lists
from betaclip.data.phrases.spans import MAX_SENTENCE_CHARS, NOUN, SPATIAL, VERB, PhraseStyle, Span, select_spans

_WORD = re.compile(r"\w+(?:[-'’/.]\w+)*|[^\w\s]")
_DETERMINER, _PREPOSITION, _BREAK, _AUXILIARY, _MARK, _VERB, _WORD_TAG = range(7)


class RuleExtractor:
    """Finds phrases by word lists; needs nothing installed."""

    name = "betaclip rules 1"
    style: PhraseStyle = "longest"

    def __call__(self, sentences: Iterable[str]) -> Iterator[list[Span]]:
        for sentence in sentences:
            yield find_spans(sentence[:MAX_SENTENCE_CHARS])


def find_spans(sentence: str) -> list[Span]:
    """Phrases of the same kinds as ``spacy_parser.find_spans``; a spatial phrase belongs to the noun before it."""
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
    """The class of each lower-case word of a sentence; a word's class may depend on those before it."""
    tags = [_closed_class(word) for word in words]
    for i, word in enumerate(words):
        previous, before = (words[i - 1], tags[i - 1]) if i else ("", _MARK)
        following, after = (words[i + 1], tags[i + 1]) if i + 1 < len(words) else ("", _MARK)
        if previous in lists.ARTICLES and tags[i] in (_PREPOSITION, _BREAK):
            tags[i] = _WORD_TAG  # "the far end", "a neatly folded towel"
        elif (word == "her" and after == _DETERMINER) or (word == "full" and following == "of"):
            tags[i] = _BREAK
        elif tags[i] == _WORD_TAG and _is_verb(_Place(word, previous, before, following, after)):
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


class _Place(NamedTuple):
    """A word of no closed class, and its neighbours with their classes."""

    word: str
    previous: str
    before: int  # class of the previous word
    following: str
    after: int  # class of the following word

    def follows_plural(self) -> bool:
        return (self.previous.endswith("s") and not self.previous.endswith("ss")) or self.previous in lists.PLURALS


_Rules = tuple[tuple[Callable[[_Place], bool], bool], ...]

# Whether a word is a verb: the first rule that applies decides; if none does, it is not.
_ENDS_IN_ING: _Rules = (
    (lambda p: p.before in (_AUXILIARY, _BREAK) or p.previous == ",", True),  # "is running"
    (lambda p: p.before == _DETERMINER, False),  # "a running man"
    (lambda p: p.word in lists.TRANSITIVE, True),  # "a man holding balloons"
    (lambda p: p.after == _WORD_TAG, False),  # "with running water"
    (lambda p: p.before == p.after == _PREPOSITION, False),  # "of carving on"
    (lambda p: True, True),
)
_PARTICIPLE: _Rules = (
    (lambda p: p.before in (_AUXILIARY, _BREAK) and p.after != _WORD_TAG, True),  # "is painted"
    (lambda p: p.before == _DETERMINER, False),  # "a painted"
    (lambda p: p.after in (_PREPOSITION, _BREAK, _DETERMINER), True),  # "cups filled with"
)
_OTHER_FORM: _Rules = (
    (lambda p: p.following == "of", False),  # "piles of"
    (lambda p: p.previous == "to" or p.before == _AUXILIARY, True),  # "to block"
    (lambda p: p.before in (_DETERMINER, _PREPOSITION, _MARK), False),  # "a park"
    (lambda p: p.previous in ("that", "which", "who"), True),
    (lambda p: p.before == _WORD_TAG and p.after == _DETERMINER, True),  # "dogs cross the"
)
_HARDLY_A_NOUN: _Rules = (
    *_OTHER_FORM,
    (  # "the boy runs", "the boys run", but not "the boy run"
        lambda p: (p.word.endswith("s") or p.follows_plural()) and p.after in (_PREPOSITION, _BREAK, _WORD_TAG, _MARK),
        True,
    ),
)
_NOUN_OR_VERB: _Rules = (
    *_OTHER_FORM,
    (lambda p: p.follows_plural() and not p.word.endswith("s") and p.after == _PREPOSITION, True),  # "cars park in"
)


def _is_verb(place: _Place) -> bool:
    return next((verdict for applies, verdict in _rules_for(place.word) if applies(place)), False)


def _rules_for(word: str) -> _Rules:
    if word in lists.NOT_PARTICIPLES:
        return ()
    if word.endswith("ing"):
        return _ENDS_IN_ING
    if (word.endswith("ed") and not word.endswith("eed")) or word in lists.PARTICIPLES:
        return _PARTICIPLE
    bases = _bases(word)
    if not bases.isdisjoint(lists.VERBS):
        return _HARDLY_A_NOUN
    return () if bases.isdisjoint(lists.NOUN_VERBS) else _NOUN_OR_VERB


def _bases(word: str) -> set[str]:
    """The verbs of which a word may be the third person, or the word itself."""
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
    """Begin and end of each noun phrase: determiners and the words after them, but no adjectives alone after "is"."""
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
    """Whether the words from ``begin``, which no determiner opens, follow "is" or the like: "is warm and very dry"."""
    if begin and tags[begin - 1] == _VERB:  # "is painting bowls", unlike "is painted and dry"
        return False
    while begin and tags[begin - 1] in (_BREAK, _VERB, _WORD_TAG):
        begin -= 1
    return begin > 0 and tags[begin - 1] == _AUXILIARY and words[begin - 1] not in lists.HAVE


def _spatial_end(i: int, words: list[str], chunks: dict[int, int]) -> int | None:
    """The end of the spatial phrase that begins with word ``i``, or None. chunks: the end of each noun phrase."""
    if words[i] in lists.BEFORE_TO and words[i + 1 : i + 2] == ["to"]:
        return chunks.get(i + 2)
    end = chunks.get(i + 1)
    if end is None or words[i] not in lists.PLACE_PREPOSITIONS:
        return None
    if words[end - 1] in lists.PLACES:
        alone = None if end == i + 2 else end  # "on the left of it" says something without "it", "in front of it" not
        return chunks.get(end + 1, alone) if words[end : end + 1] == ["of"] else end
    return end if words[i] in lists.SPATIAL_PREPOSITIONS else None

"""Cleans captions and splits them into sentences."""

import re
from collections import defaultdict
from typing import NamedTuple

from betaclip.data.phrases.words import (
    ALSO_LAST,
    AUXILIARIES,
    BEFORE_NAMES,
    BREAKS,
    DETERMINERS,
    NEVER_LAST,
    PREPOSITIONS,
)

_MAX_CLAUSE = 50  # words; captioners get stuck on a clause or a sentence, hardly on anything longer

_OPENING, _CLOSING = "\"'(“‘«[", "\"')”’»]"
_WIDE_MARKS = re.compile("(?<=[。！？])(?![。！？」』”’])")  # no blank follows them
_MARKS = (".", "!", "?", "…", "。", "！", "？")

_INITIALS = re.compile(r"[A-Z]|[A-Za-z]{1,2}(\.[A-Za-z]{1,2})+")  # "J." Smith, "U.S." flag
# A capital on one of these begins a sentence, not a name: "in the U.S. The flag".
_FIRST_WORDS = DETERMINERS | PREPOSITIONS | BREAKS | AUXILIARIES


class _Word(NamedTuple):
    """A word of a caption.

    key: the word without punctuation, by which words are compared. ends: whether a sentence ends with it.
    line: whether it ends only because its line does.
    """

    text: str
    key: str
    ends: bool
    line: bool


def clean(caption: str) -> str:
    """The caption with single blanks, and with clauses and sentences that are repeated only once.

    One word counts as repeated if it comes three times in a row (``very very very big``), several words if they come
    twice (``a dog, a dog``). What crosses the end of a sentence is repeated only if it is whole sentences: ``wears
    number 10. 10 fans watch`` stays. A line break stays if it ends a sentence that has no mark of its own.
    """
    kept: list[_Word] = []
    places: defaultdict[str, list[int]] = defaultdict(list)  # where each key is in kept
    for word in _without_runs(_words(caption)):
        places[word.key].append(len(kept))
        kept.append(word)
        if length := _repeated(kept, places[word.key]):
            for repeated in kept[-length:]:
                places[repeated.key].pop()
            del kept[-2 * length : -length]
    return "".join(word.text + ("\n" if word.line else " ") for word in kept).strip()


def split_sentences(caption: str) -> list[str]:
    """The sentences of a clean caption, each without its closing full stops; empty ones dropped."""
    sentences = []
    for line in _WIDE_MARKS.sub("\n", caption).split("\n"):
        words = line.split()
        begin = 0
        for end in range(1, len(words) + 1):
            if end == len(words) or _ends_sentence(words, end - 1):
                sentences.append(" ".join(words[begin:end]).rstrip(" ."))
                begin = end
    return [sentence for sentence in sentences if sentence]


def join_sentences(sentences: list[str]) -> str:
    """One text of sentences that have lost their full stops; two are never joined by ``".."`` or ``"!."``."""
    joined = ""
    for sentence in sentences:
        joined += (" " if joined.rstrip(_CLOSING).endswith(_MARKS) else ". ") + sentence if joined else sentence
    return joined


def _words(caption: str) -> list[_Word]:
    words: list[_Word] = []
    for line in _lines(caption):
        texts = line.split()
        for i, text in enumerate(texts):
            marked = _ends_sentence(texts, i) if i + 1 < len(texts) else text.rstrip(_CLOSING).endswith(_MARKS)
            last = i + 1 == len(texts)
            words.append(_Word(text, text.rstrip(".,;:!?") or text, marked or last, last and not marked))
    return words


def _lines(caption: str) -> list[str]:
    """The lines of a caption, but one that goes on in lower case belongs to the line before it."""
    lines: list[str] = []
    after_blank = True
    for line in _WIDE_MARKS.sub("\n", caption).splitlines():
        line = line.strip()
        if line and not after_blank and line[0].islower():
            lines[-1] += f" {line}"
        elif line:
            lines.append(line)
        after_blank = not line
    return lines


def _ends_sentence(words: list[str], at: int) -> bool:
    """Whether a sentence ends between a word and the next one."""
    word, following = words[at].lstrip(_OPENING), words[at + 1].lstrip(_OPENING)
    bare = word.rstrip(_CLOSING)
    capital = following[:1].isupper() or following[:1].isdigit()
    if not bare.endswith(_MARKS) or (bare != word and not capital):
        return False  # the sign says "STOP!" in red
    if not bare.endswith(".") or bare.endswith(".."):
        return True
    name, begins = bare[:-1], following[:1].isupper() and following.rstrip(",").lower() in _FIRST_WORDS
    if name.lower() in NEVER_LAST or (name.lower() == "no" and following[:1].isdigit()):
        return False
    if name.lower() in ALSO_LAST:
        return capital
    if _INITIALS.fullmatch(name) and len(name) == 1 and at > 0:  # "Samuel L. Jackson", but "vitamin C. Dogs"
        previous = words[at - 1].lstrip(_OPENING)
        return begins or not (previous[:1].isupper() or previous in _FIRST_WORDS)
    return begins or not (name.lower() in BEFORE_NAMES or _INITIALS.fullmatch(name))


def _without_runs(words: list[_Word]) -> list[_Word]:
    """Only the last of three or more equal words in a row, if they are in one sentence or each of them is one."""
    kept: list[_Word] = []
    begin = 0
    for end in range(1, len(words) + 1):
        if end < len(words) and words[end].key == words[begin].key:
            continue
        run = words[begin:end]
        within = not any(word.ends for word in run[:-1])
        sentences = all(word.ends for word in run) and (begin == 0 or words[begin - 1].ends)
        kept += run[-1:] if len(run) > 2 and (within or sentences) else run
        begin = end
    return kept


def _repeated(words: list[_Word], places: list[int]) -> int:
    """How many of the last words, two or more, repeat the words before them; the fewest that do, or 0.

    places: where the key of the last word is.
    """
    for place in reversed(places[:-1]):
        length = places[-1] - place
        if length > min(_MAX_CLAUSE, len(words) // 2):
            break
        first, second = words[-2 * length : -length], words[-length:]
        if length > 1 and all(a.key == b.key for a, b in zip(first, second, strict=True)):
            starts = 2 * length == len(words) or words[-2 * length - 1].ends
            if not any(word.ends for word in first) or (starts and first[-1].ends and second[-1].ends):
                return length
    return 0

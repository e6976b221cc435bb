"""The word lists do not contradict each other."""

import pytest

from betaclip.data.phrases import words

LISTS = {name: value for name, value in vars(words).items() if isinstance(value, frozenset)}


@pytest.mark.parametrize("name", LISTS)
def test_words_are_single_and_in_lower_case(name):
    assert LISTS[name]
    for word in LISTS[name]:
        assert word == word.lower() and word.replace(".", "").isalpha()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("DETERMINERS", "PREPOSITIONS"), ("DETERMINERS", "AUXILIARIES"), ("DETERMINERS", "BREAKS"),
        ("PREPOSITIONS", "AUXILIARIES"), ("PREPOSITIONS", "BREAKS"), ("AUXILIARIES", "BREAKS"),
        ("BEFORE_NAMES", "ALSO_LAST"), ("BEFORE_NAMES", "NEVER_LAST"), ("ALSO_LAST", "NEVER_LAST"),
        ("VERBS", "NOUN_VERBS"), ("PARTICIPLES", "NOT_PARTICIPLES"), ("TRANSITIVE", "NOT_PARTICIPLES"),
    ],
)  # fmt: skip
def test_classes_are_disjoint(one, other):
    assert LISTS[one] & LISTS[other] == set()

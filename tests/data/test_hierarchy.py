"""Caption to hierarchy: cleaning, sentences, sampling, and which phrases stay."""

import random

import pytest

from betaclip.data.hierarchy import clean, distinct_phrases, hierarchy, split_sentences
from betaclip.data.phrases.spans import NOUN, SPATIAL, VERB, Phrase

CAPTION = "One cat sits. Two dogs run. Three birds fly. Four fish swim. Five cows graze. Six pigs eat. Seven ants dig."


def last_word(sentence):
    return [Phrase(sentence.split()[-1], VERB), Phrase(sentence.rsplit(" ", 1)[0], NOUN)]


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A cat\non a\r\n mat. ", "A cat on a mat."),
        ("a dog, a dog, a dog and a cat", "a dog and a cat"),
        ("The sky is blue. The sky is blue. The sky is blue. A bird", "The sky is blue. A bird"),
        ("very very very, very big", "very big"),
        ("The cat is on the mat", "The cat is on the mat"),
        ("a b a b a c a b a c", "a b a c"),
        ("\n", ""),
        (" ".join(map(str, [*range(50), *range(50), "x"])), " ".join(map(str, [*range(50), "x"]))),
        (" ".join(map(str, [*range(51), *range(51)])), " ".join(map(str, [*range(51), *range(51)]))),
    ],
)
def test_clean(caption, cleaned):
    assert clean(caption) == cleaned


def test_clean_matches_brute_force():
    def slow(caption):
        kept = []
        for word in caption.split():
            kept.append(word)
            keys = [word.rstrip(".,;:") or word for word in kept]
            for n in range(1, min(50, len(kept) // 2) + 1):
                if keys[-n:] == keys[-2 * n : -n]:
                    del kept[-2 * n : -n]
                    break
        return " ".join(kept)

    rng = random.Random(0)
    captions = [" ".join(rng.choices(["a", "b", "c", "a,", "b.", "."], k=rng.randrange(30))) for _ in range(2000)]
    assert sum(slow(caption) != caption for caption in captions) > 1000
    for caption in captions:
        assert clean(caption) == slow(caption), caption


def test_split_sentences():
    assert split_sentences("A cat. . A dog... Two. Done.") == ["A cat", "A dog", "Two", "Done"]
    assert split_sentences("Built in 3.5 days") == ["Built in 3.5 days"]
    assert split_sentences(". .") == []


def test_texts_and_levels():
    texts, levels = hierarchy(CAPTION, last_word, random.Random(0))
    sentences = [text for text, level in zip(texts, levels, strict=True) if level == 1]
    assert levels == [0] + [1] * 5 + [2] * 10
    assert texts[0] == ". ".join(sentences)
    everything = split_sentences(CAPTION)
    assert [everything.index(sentence) for sentence in sentences] == sorted(map(everything.index, sentences))
    assert texts[6:] == [s.rsplit(" ", 1)[0] for s in sentences] + [s.split()[-1] for s in sentences]


def test_no_double_full_stops():
    caption = "A tin of tea etc.. A cup. A pot..."
    assert hierarchy(caption, last_word, random.Random(0))[0][0] == "A tin of tea etc. A cup. A pot"


def test_sampling():
    draws = [hierarchy(CAPTION, last_word, random.Random(seed))[0][1:6] for seed in range(200)]
    assert draws[3] == hierarchy(CAPTION, last_word, random.Random(3))[0][1:6]
    counts = {s: sum(s in draw for draw in draws) for s in split_sentences(CAPTION)}
    assert all(len(set(draw)) == 5 for draw in draws)
    assert all(110 < count < 175 for count in counts.values()), counts  # 200 · 5 / 7 = 143, σ = 6.4


def test_fewer_sentences_than_wanted():
    texts, levels = hierarchy("A cat. A dog.", lambda sentence: [], random.Random(0))
    assert (texts, levels) == (["A cat. A dog", "A cat", "A dog"], [0, 1, 1])
    assert hierarchy(" \n. ", last_word, random.Random(0)) == ([], [])


def test_limits():
    def phrases(sentence):
        return [Phrase(f"{sentence} {i}", NOUN) for i in range(20)]

    texts, levels = hierarchy(CAPTION, phrases, random.Random(0))
    assert len(texts) == 36 and levels.count(2) == 30
    texts, levels = hierarchy(CAPTION, phrases, random.Random(0), sentences=2, fits=lambda p: p.endswith(" 7"))
    assert levels == [0, 1, 1, 2, 2] and all(text.endswith(" 7") for text in texts[3:])


def test_distinct_phrases_keeps_nouns_first_and_each_once():
    phrases = [
        Phrase("on the left", SPATIAL), Phrase("a cat", NOUN), Phrase("sitting on", VERB), Phrase("A cat", NOUN),
        Phrase("a mat", NOUN), Phrase("sitting on", VERB),
    ]  # fmt: skip
    assert distinct_phrases(phrases, 9) == ["a cat", "a mat", "on the left", "sitting on"]
    assert distinct_phrases(phrases, 3) == ["a cat", "a mat", "on the left"]

"""Caption to hierarchy: levels, sampling, and which phrases stay."""

import random

from betaclip.data.hierarchy import distinct_phrases, hierarchy, published_phrases
from betaclip.data.phrases.spans import NOUN, SPATIAL, VERB, Phrase
from betaclip.data.sentences import split_sentences

CAPTION = "One cat sits. Two dogs run. Three birds fly. Four fish swim. Five cows graze. Six pigs eat. Seven ants dig."


def last_word(sentence):
    return [Phrase(sentence.split()[-1], VERB), Phrase(sentence.rsplit(" ", 1)[0], NOUN)]


def test_texts_and_levels():
    texts, levels = hierarchy(CAPTION, last_word, random.Random(0))
    sentences = [text for text, level in zip(texts, levels, strict=True) if level == 1]
    assert levels == [0] + [1] * 5 + [2] * 10
    assert texts[0] == ". ".join(sentences)
    everything = split_sentences(CAPTION)
    assert [everything.index(sentence) for sentence in sentences] == sorted(map(everything.index, sentences))
    assert texts[6:] == [s.rsplit(" ", 1)[0] for s in sentences] + [s.split()[-1] for s in sentences]


def test_no_double_marks():
    caption = "What a day! Is it sunny? A cup."
    assert hierarchy(caption, last_word, random.Random(0))[0][0] == "What a day! Is it sunny? A cup"


def test_no_double_full_stops():
    caption = "A tin of tea etc.. A cup. A pot..."
    assert hierarchy(caption, last_word, random.Random(0))[0][0] == "A tin of tea etc. A cup. A pot"


def test_sampling():
    draws = [hierarchy(CAPTION, last_word, random.Random(seed))[0][1:6] for seed in range(200)]
    assert draws[3] == hierarchy(CAPTION, last_word, random.Random(3))[0][1:6]
    counts = {s: sum(s in draw for draw in draws) for s in split_sentences(CAPTION)}
    assert all(len(set(draw)) == 5 for draw in draws)
    assert all(110 < count < 175 for count in counts.values()), counts  # 200 · 5 / 7 = 143, σ = 6.4


def test_random_order():
    everything, orders = split_sentences(CAPTION), set()
    for seed in range(40):
        texts, levels = hierarchy(CAPTION, last_word, random.Random(seed), sentence_order="random")
        order = [everything.index(sentence) for sentence in texts[1:6]]
        assert len(set(order)) == 5 and levels.count(1) == 5 and texts[0] == ". ".join(texts[1:6])
        assert texts[6] == texts[1].rsplit(" ", 1)[0]  # phrases follow the sentences
        orders.add(tuple(order))
    assert len(orders) > 35 and len({order[0] for order in orders}) == 7
    texts = [hierarchy("A cat. A dog.", lambda _: [], random.Random(s), sentence_order="random")[0] for s in range(20)]
    assert {text for text, *_ in texts} == {"A cat. A dog", "A dog. A cat"}


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
    assert distinct_phrases(phrases) == ["a cat", "a mat", "on the left", "sitting on"]


def test_published_phrases_are_ordered_by_kind():
    phrases = [
        Phrase("On the left", SPATIAL), Phrase("The cat", NOUN), Phrase("sitting on", VERB), Phrase("the cat", NOUN),
        Phrase("on the left", SPATIAL), Phrase("The cat", NOUN), Phrase("looking at", VERB), Phrase("it", NOUN),
    ]  # fmt: skip
    expected = ["The cat", "the cat", "it", "sitting on", "looking at", "on the left"]
    assert published_phrases(phrases) == expected
    for limit in (2, 4, 30):
        texts, _ = hierarchy(
            "The cat", lambda sentence: phrases, random.Random(0), max_phrases=limit, phrase_style="published"
        )
        assert texts[2:] == expected[:limit]

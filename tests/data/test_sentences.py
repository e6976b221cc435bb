"""Captions to sentences: repetitions are removed, and sentences end in the right places."""

import random
from itertools import groupby

import pytest

from betaclip.data.sentences import clean, join_sentences, split_sentences


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A cat\non a\r\n mat. ", "A cat on a mat."),
        ("a dog, a dog, a dog and a cat", "a dog and a cat"),
        ("The sky is blue. The sky is blue. The sky is blue. A bird", "The sky is blue. A bird"),
        ("The sky is blue. The sky is blue", "The sky is blue"),
        ("It rains. A cat. It rains. A cat. A dog.", "It rains. A cat. A dog."),
        ("very very very, very big", "very big"),
        ("very very big", "very very big"),
        ("No. No. No. No.", "No."),
        ("The cat is on the mat", "The cat is on the mat"),
        ("a b a b a c a b a c", "a b a c"),
        ("\n", ""),
        (" ".join(map(str, [*range(50), *range(50), "x"])), " ".join(map(str, [*range(50), "x"]))),
        (" ".join(map(str, [*range(51), *range(51)])), " ".join(map(str, [*range(51), *range(51)]))),
    ],
)
def test_clean(caption, cleaned):
    assert clean(caption) == cleaned


@pytest.mark.parametrize(
    "caption",
    [
        "The player wears number 10. 10 fans watch him.",
        "The woman on the left is Anna. Anna holds a cup.",
        "The woman on the left is Anna Smith. Anna Smith holds a cup.",
        "The banner says STOP. STOP is painted in white.",
        "The banner says STOP. STOP. STOP. Cars wait.",
        "The banner says STOP! STOP is painted in white.",
        "Is it a dog? A dog sits there.",
        "The player is Al. He is Al. He runs.",
        "The plate reads 77 77 B.",
        "The sky is blue. The sky is blue and clear.",
        "This is the U.S. Navy. The U.S. Navy sails.",
        "He counts to 3. 3 birds fly. 3 birds sing.",
    ],
)
def test_sentences_stay_apart(caption):
    assert clean(caption) == caption


def test_clean_matches_brute_force():
    def slow(caption):
        words = []
        for _, same in groupby(caption.split(), lambda word: word.rstrip(",;:") or word):
            run = list(same)
            words += run[-1:] if len(run) > 2 else run
        kept = []
        for word in words:
            kept.append(word)
            keys = [word.rstrip(",;:") or word for word in kept]
            for n in range(2, min(50, len(kept) // 2) + 1):
                if keys[-n:] == keys[-2 * n : -n]:
                    del kept[-2 * n : -n]
                    break
        return " ".join(kept)

    rng = random.Random(0)
    captions = [" ".join(rng.choices(["a", "b", "c", "a,", "b;", ","], k=rng.randrange(30))) for _ in range(2000)]
    assert sum(slow(caption) != caption for caption in captions) > 1000
    for caption in captions:
        assert clean(caption) == slow(caption), caption


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("A cat. . A dog... Two. Done.", ["A cat", "A dog", "Two", "Done"]),
        ("Built in 3.5 days", ["Built in 3.5 days"]),
        (". .", []),
        ("What a day! Is it sunny? Yes", ["What a day!", "Is it sunny?", "Yes"]),
        ("Wow!! What?! ok", ["Wow!!", "What?!", "ok"]),
        ("A red mug\nA blue cup", ["A red mug", "A blue cup"]),
        ("- a mug\r\n- a cup", ["- a mug", "- a cup"]),
        ("A cat sits\non a mat\n\nand sleeps", ["A cat sits on a mat", "and sleeps"]),
        ("一只猫。一只狗！「好。」鸟", ["一只猫。", "一只狗！", "「好。」鸟"]),
        ("Mary hangs near Dr. Smith", ["Mary hangs near Dr. Smith"]),
        ("St. Paul in a U.S. Navy yard, e.g. Boats", ["St. Paul in a U.S. Navy yard, e.g. Boats"]),
        ("He lives in the U.S. The flag waves", ["He lives in the U.S", "The flag waves"]),
        ("A shop on Main St. In front, cars park", ["A shop on Main St", "In front, cars park"]),
        ("Samuel L. Jackson and J. R. Smith. Mr. Jones", ["Samuel L. Jackson and J. R. Smith", "Mr. Jones"]),
        ("Mr. and Mrs. Jones", ["Mr. and Mrs. Jones"]),
        ("It has vitamin C. Dogs bark", ["It has vitamin C", "Dogs bark"]),
        ("Cups, plates etc. and forks. Knives etc. Spoons", ["Cups, plates etc. and forks", "Knives etc", "Spoons"]),
        ("At 5 p.m. the sun sets. At 5 p.m. Lamps are lit", ["At 5 p.m. the sun sets", "At 5 p.m", "Lamps are lit"]),
        ("Bus No. 10 stops. Is it red? No. It is blue", ["Bus No. 10 stops", "Is it red?", "No", "It is blue"]),
        ('Signs say "STOP!" in red. One says "GO." A man', ['Signs say "STOP!" in red', 'One says "GO."', "A man"]),
        ("(A cat sits.) A dog runs", ["(A cat sits.)", "A dog runs"]),
    ],
)  # fmt: skip
def test_split_sentences(caption, sentences):
    assert split_sentences(clean(caption)) == sentences


def test_splitting_is_done_once():
    """Splitting a sentence again gives that sentence, so that a cache of phrases finds it."""
    rng, words = (
        random.Random(0),
        ["Dr.", "St.", "The", "cat", "U.S.", "Wow!", "why?", "10.", "10", "Anna", '"Go."', "。", "\n"],
    )
    for _ in range(2000):
        caption = " ".join(rng.choices(words, k=rng.randrange(12)))
        sentences = split_sentences(clean(caption))
        assert split_sentences("\n".join(sentences)) == sentences
        assert all(sentence == sentence.strip() and "\n" not in sentence for sentence in sentences)


def test_join_sentences():
    assert join_sentences([]) == ""
    assert join_sentences(["A cat", "Wow!", 'He says "No."', "A dog"]) == 'A cat. Wow! He says "No." A dog'

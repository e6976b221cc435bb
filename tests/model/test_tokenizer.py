"""The tokenizer against open_clip's: ids, and the end token of texts that are too long."""

import pickle

import open_clip
import pytest

from betaclip.model.tokenizer import EOT, SOT, Tokenizer

TEXTS = [
    "a large striped red triangle",
    "",
    "  Ünïcode, 日本語 &amp; emoji 🐈‍⬛;\nit's <b>3.50</b>!!  ",
    "A man who'll ride\t12 tandem-bicycles...",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "nothing <end_of_text> follows the end",
    "salt &amp; pepper",
    "a cafÃ© with ﬁsh",
    "a red\x1b[31m car",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("context_length", [77, 248])
def test_matches_open_clip(text, context_length):
    padded = open_clip.tokenize(text, context_length)[0].tolist()
    assert Tokenizer(context_length)(text) == padded[: padded.index(EOT) + 1]


@pytest.mark.parametrize("context_length", [3, 77, 248])
def test_too_long(context_length):
    text = "the red cat sat on the mat " * 60
    ids = Tokenizer(context_length)(text)
    assert len(ids) == context_length
    assert (ids[0], ids[-1], ids.count(EOT)) == (SOT, EOT, 1)
    assert ids[:-1] == Tokenizer(10_000)(text)[: context_length - 1]


def test_too_long_without_its_end():
    """The start token is then the largest, at which open_clip's text tower and the released one read the text."""
    cut = Tokenizer(5, keep_end=False)
    assert cut("a red cat") == Tokenizer()("a red cat")  # as long as may be
    assert cut("a red fat cat") == [SOT]
    assert max(Tokenizer()("a red fat cat")[:5]) == SOT


def test_calls_are_independent():
    tokenizer = Tokenizer()
    tokenizer("a cat").append(0)
    assert tokenizer("a cat") == Tokenizer()("a cat")
    assert tokenizer("a cat")[-1] == EOT


def test_pickle_is_small():
    data = pickle.dumps(Tokenizer(248))
    assert len(data) < 1000  # workers build the vocabulary themselves
    assert pickle.loads(data) == Tokenizer(248)


def test_rejects():
    with pytest.raises(ValueError, match="context_length: expected at least 3, got 2"):
        Tokenizer(2)

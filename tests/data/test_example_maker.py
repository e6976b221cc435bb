"""From a picture and a caption to an example."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from betaclip.data.batches import Bad, Example
from betaclip.data.example_maker import ExampleMaker
from betaclip.data.phrases.cache import UnknownSentenceError
from betaclip.data.phrases.spans import NOUN, Phrase
from betaclip.model.tokenizer import SOT, Tokenizer

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CAPTION = " ".join(f"Sentence {word} has words." for word in NUMBERS)


def phrases(sentence):
    return [Phrase(word, NOUN) for word in sentence.split()[:2]]


def picture(format="JPEG", mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


@pytest.fixture
def make():
    return ExampleMaker(16, 77, phrases)


def test_example(make):
    example = make(io.BytesIO(picture()), "a.jpg", CAPTION, 5)
    assert isinstance(example, Example) and example.path == "a.jpg"
    assert example.image.shape == (3, 16, 16) and example.image.dtype == torch.float32
    assert example.levels == [0] + [1] * 5 + [2] * 6  # "Sentence" once, and five numbers
    assert example.texts[0] == ". ".join(example.texts[1:6])
    assert example.tokens == [Tokenizer(77)(text) for text in example.texts]


def test_seed_decides_everything(make):
    def one(seed):
        torch.rand(seed + 1)
        np.random.default_rng().random()
        return make(io.BytesIO(picture()), "a.jpg", CAPTION, seed)

    first, again, other = one(1), one(1), one(2)
    assert torch.equal(first.image, again.image) and first.texts == again.texts
    assert not torch.equal(first.image, other.image) and first.texts != other.texts


def test_limits():
    make = ExampleMaker(16, 9, phrases, sentences=2, max_phrases=1)
    example = make(io.BytesIO(picture()), "a.jpg", CAPTION, 0)
    assert example.levels == [0, 1, 1, 2]
    assert [len(tokens) for tokens in example.tokens] == [9, 6, 6, 3]  # the caption is cut
    make = ExampleMaker(16, 77, lambda sentence: [Phrase("a b c", NOUN), Phrase("d e", NOUN)], max_phrase_tokens=2)
    assert make(io.BytesIO(picture()), "a.jpg", CAPTION, 0).texts[6:] == ["d e"]


def test_long_phrases_of_the_released_code():
    """They stay, without their end token; a sentence of as many tokens is whole."""
    make = ExampleMaker(
        16, 77, lambda sentence: [Phrase("a b c", NOUN), Phrase("d e", NOUN)], max_phrase_tokens=2,
        long_phrases="published",
    )  # fmt: skip
    example = make(io.BytesIO(picture()), "a.jpg", CAPTION, 0)
    assert example.texts[6:] == ["a b c", "d e"]
    assert example.tokens[6:] == [[SOT], Tokenizer()("d e")] and example.tokens[1] == Tokenizer()(example.texts[1])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_modes(make, mode):
    assert make(io.BytesIO(picture("PNG", mode)), "a.png", CAPTION, 0).image.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "UnidentifiedImageError"),
        (b"not a picture", "UnidentifiedImageError"),
        (picture()[:-200], "OSError: image file is truncated"),
        (picture("PNG")[:-200], "OSError: .*(truncated|broken)"),
    ],
)
def test_broken_pictures(make, content, reason):
    bad = make(io.BytesIO(content), "a.jpg", CAPTION, 0)
    assert isinstance(bad, Bad) and bad.path == "a.jpg"
    assert re.match(reason, bad.reason), bad.reason


def test_missing_picture(make, tmp_path):
    bad = make(tmp_path / "a.jpg", str(tmp_path / "a.jpg"), CAPTION, 0)
    assert isinstance(bad, Bad) and bad.reason.startswith("FileNotFoundError")


def test_bad_captions(make):
    assert make(io.BytesIO(picture()), "a.jpg", " \n. ", 0) == Bad("a.jpg", "empty caption")
    silent = ExampleMaker(16, 77, lambda sentence: [])
    assert silent(io.BytesIO(picture()), "a.jpg", "So.", 0) == Bad("a.jpg", "no phrases in the caption 'So'")
    unwanted = ExampleMaker(16, 77, lambda sentence: [], max_phrases=0)
    assert unwanted(io.BytesIO(picture()), "a.jpg", "So it is.", 0).levels == [0, 1]


def test_cache_of_other_captions():
    def unknown(sentence):
        raise UnknownSentenceError("phrases does not know it")

    bad = ExampleMaker(16, 77, unknown)(io.BytesIO(picture()), "a.jpg", CAPTION, 0)
    assert bad == Bad(
        "a.jpg", "phrases does not know it: the file was prepared from other captions; run betaclip prepare on these"
    )

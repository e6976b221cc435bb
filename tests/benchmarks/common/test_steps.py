"""The steps that are compared have one loss and realistic texts."""

import json
import random

import pytest
import torch
from common import steps
from support.paths import ROOT
from support.tiny import TOKENIZER_MODEL

from betaclip.model.beta_clip import ModelConfig, create_model

IMAGES, TEXTS = 2, 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(ModelConfig(TOKENIZER_MODEL, context_length=248)).double()


@pytest.fixture(scope="module")
def batch(model):
    return steps.synthetic_step_batch(model, IMAGES, TEXTS, torch.float64)


def test_texts_are_those_of_training():
    captions = json.loads((ROOT / "benchmarks" / "captions.json").read_text(encoding="utf-8"))["captions"]
    for caption in captions:
        texts = steps.texts_of_caption(caption, 36, random.Random(0))
        assert len(texts) == len(set(texts)) == 36
        assert texts[0] == ". ".join(texts[1:6])
        assert all(sentence in caption for sentence in texts[1:6])
        assert all(len(phrase.split()) <= 14 and phrase in caption for phrase in texts[6:])
    with pytest.raises(ValueError, match="texts_per_image: expected at most"):
        steps.texts_of_caption("One sentence. Another", 36, random.Random(0))


def test_repeated_captions_are_in_other_words(model):
    """An image that repeats a caption has its lengths, but shares no more than the tokens around every text."""
    texts = steps.synthetic_step_batch(model, 13, 2, torch.float32).texts
    first, again = (texts.of_images(i, i + 1) for i in (0, 12))
    assert not set(first.tokens.tolist()) & set(again.tokens.tolist()) - {49406, 49407}
    assert texts.max_texts_per_image == 2 and texts.num_images == 13


def test_padded(model, batch):
    captions, phrases = steps.padded(batch.texts)
    assert captions.shape[:2] == (IMAGES, 6) and phrases.shape[:2] == (IMAGES, TEXTS - 6)
    rows = [row for image in range(IMAGES) for block in (captions, phrases) for row in block[image]]
    for row, tokens in zip(rows, batch.texts.tokens.split(batch.texts.lengths.tolist()), strict=True):
        assert torch.equal(row[: len(tokens)], tokens) and not row[len(tokens) :].any()
    assert phrases[:, :, -1].any() and captions[:, :, -1].any()  # no longer than the longest


@pytest.mark.parametrize("part", steps.PARTS)
def test_all_compute_the_same(part, model, batch):
    one = torch.ones((), dtype=torch.float64)
    values = [
        steps.part_call(build(model), part, batch).run("forward+backward", one)()
        for build in steps.step_implementations().values()
    ]
    assert all(bool(gradient.any()) for gradient in values[0][1:])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (len(values[0]) == 1 + len(trained)) == (part == "step")  # no other part trains everything
    for value in values[1:]:
        for a, b in zip(value, values[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_tokens(model, batch):
    ours, published = steps.OurStep(model), steps.PublishedStep(model, checkpointed=True)
    assert published.tokens(batch) == sum(block.numel() for block in steps.padded(batch.texts))
    texts = [t.tolist() for t in batch.texts.tokens.split(batch.texts.lengths.tolist())]
    assert ours.tokens(batch) == len({tuple(text[: i + 1]) for text in texts for i in range(len(text))})

"""Ragged texts: construction, slots, parts, and what is rejected."""

from collections.abc import Iterator

import pytest
import torch

from betaclip.model.texts import RaggedTexts
from betaclip.training.objective import captions

TEXTS = [[[1, 5, 9], [1, 9]], [], [[1, 6, 7, 9]]]
LEVELS = [[0, 2], [], [0]]


def test_of_lists():
    texts = RaggedTexts.of(TEXTS)
    assert texts.tokens.tolist() == [1, 5, 9, 1, 9, 1, 6, 7, 9]
    assert texts.lengths.tolist() == [3, 2, 4]
    assert texts.image_index.tolist() == [0, 0, 2]
    assert (texts.num_images, texts.counts.tolist(), texts.max_texts_per_image) == (3, [2, 0, 1], 2)


def test_slots():
    index, valid = RaggedTexts.of(TEXTS).slots()
    assert index.tolist() == [[0, 1], [0, 0], [2, 0]]
    assert valid.tolist() == [[True, True], [False, False], [True, False]]
    index, valid = RaggedTexts.of(TEXTS).slots(3)
    assert index.shape == valid.shape == (3, 3) and valid.sum() == 3


def test_ids():
    """They depend on the tokens alone: on their values, places and number."""
    texts = RaggedTexts.of([[[1, 5, 9], [1, 9], [1, 5, 9]], [[5, 1, 9], [1, 5, 9, 0]], [[1, 5, 9]]], None)
    ids = texts.ids.tolist()
    assert ids[0] == ids[2] == ids[5] == RaggedTexts.of([[[1, 5, 9]]]).ids[0] and len(set(ids)) == 4 and min(ids) >= 0
    every = RaggedTexts.of([[[a, b, c] for a in range(16) for b in range(16) for c in range(16)]])
    assert len(set(every.ids.tolist())) == 16**3
    assert RaggedTexts.of([]).ids.shape == (0,)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3), (3, 3)])
def test_of_images(begin, end):
    part, truth = (
        RaggedTexts.of(TEXTS, LEVELS).of_images(begin, end),
        RaggedTexts.of(TEXTS[begin:end], LEVELS[begin:end]),
    )
    assert part.num_images == truth.num_images and RaggedTexts.of(TEXTS).of_images(begin, end).levels is None
    for name in ("tokens", "lengths", "image_index", "levels"):
        assert torch.equal(getattr(part, name), getattr(truth, name)), name


def test_nothing():
    texts = RaggedTexts.of([])
    assert (texts.num_images, texts.max_texts_per_image, len(texts.tokens)) == (0, 0, 0)
    assert texts.slots()[1].shape == (0, 0)


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_any_default_device(default_device):
    """All planning stays on the CPU; on the meta device nothing could be read."""
    test_of_lists()
    test_slots()
    test_of_images(1, 3)
    test_nothing()
    texts = RaggedTexts.of(TEXTS)
    assert texts.packing.lengths.tolist() == [2, 3, 4]
    for rows in (texts.packing.padded_rows, texts.packing.flat_rows):
        assert rows.node.device.type == "cpu"
    assert captions(texts).tokens.tolist() == [1, 5, 9, 1, 6, 7, 9] and captions(texts).levels is None
    assert captions(RaggedTexts.of(TEXTS, LEVELS)).levels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.ones(9)}, "tokens: expected one dimension of int64 on the CPU, got torch.float32"),
        ({"lengths": torch.tensor([3, 2])}, r"image_index: expected shape \(2,\) as lengths"),
        ({"lengths": torch.tensor([5, 0, 4])}, "lengths: expected at least 1, got 0"),
        ({"lengths": torch.tensor([3, 2, 5])}, "lengths: expected a sum of 9 as there are tokens, got 10"),
        ({"image_index": torch.tensor([0, 2, 1])}, "image_index: expected sorted numbers below 3"),
        ({"image_index": torch.tensor([0, 2, 3])}, "image_index: expected sorted numbers below 3"),
        ({"levels": torch.tensor([0, 2])}, r"levels: expected shape \(3,\) as lengths, got \(2,\)"),
        ({"levels": torch.zeros(3)}, "levels: expected one dimension of int64 on the CPU, got torch.float32"),
    ],
)
def test_rejects(change, message):
    texts = RaggedTexts.of(TEXTS)
    fields = {name: getattr(texts, name) for name in ("tokens", "lengths", "image_index", "num_images")} | change
    with pytest.raises(ValueError, match=message):
        RaggedTexts(**fields)

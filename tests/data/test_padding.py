"""Padding texts: where they stand, their tokens, and the released code's rows."""

import pytest
import torch
from published_replay import read_batch, text_of
from safetensors.torch import load_file
from support.paths import GOLDEN

from betaclip.data.padding import pad_as_published
from betaclip.model.texts import RaggedTexts

END = 9


def padded(tokens, levels):
    texts = pad_as_published(RaggedTexts.of(tokens, levels), END)
    rows = [ids.tolist() for ids in texts.tokens.split(texts.lengths.tolist())]
    return rows, texts.levels.tolist(), texts.image_index.tolist(), texts.num_images


def test_rows_of_the_released_code():
    """All texts that are encoded, padding included, in batches with different numbers of texts."""
    record = load_file(GOLDEN / "published_training.safetensors")
    for update in range(8):
        texts = pad_as_published(read_batch(record, update).texts, end_token=651)
        blocks = [record[f"batch.{update}.{name}"] for name in ("captions_and_sentences", "phrases")]
        masks = [record[f"batch.{update}.{name}"] for name in ("caption_and_sentence_mask", "phrase_mask")]
        rows = [text_of(row).tolist() for image in zip(*blocks, strict=True) for block in image for row in block]
        assert [ids.tolist() for ids in texts.tokens.split(texts.lengths.tolist())] == rows
        assert torch.equal(texts.levels >= 0, torch.cat(masks, 1).flatten())
        assert 0 < int((texts.levels < 0).sum()) < len(rows)


def test_image_without_texts():
    rows, levels, image, images = padded([[[7, 9]], [], [[7, 1, 9], [7, 2, 3, 4, 9]]], [[0], [], [0, 2]])
    # The length is that of captions and sentences: the phrase is longer.
    assert rows == [[7, 9], [0], [0, 0, 9], [0], [7, 1, 9], [7, 2, 3, 4, 9]]
    assert (levels, image, images) == ([0, -1, -1, -1, 0, 2], [0, 0, 1, 1, 2, 2], 3)


def test_nothing_to_pad():
    tokens, levels = [[[7, 9], [7, 1, 9]], [[7, 2, 9], [7, 3, 9]]], [[0, 1], [0, 1]]
    rows, found, _, images = padded(tokens, levels)
    assert rows == [ids for image in tokens for ids in image] and found == [0, 1, 0, 1] and images == 2
    assert padded([], []) == ([], [], [], 0)
    assert padded([[], []], [[], []]) == ([], [], [], 2)


def test_needs_levels():
    with pytest.raises(ValueError, match="levels: expected the level of each text"):
        pad_as_published(RaggedTexts.of([[[7, 9]]]), END)

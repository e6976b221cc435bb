"""Padding texts, which give all images of a batch the same number of texts, as in the released code."""

from itertools import islice

import torch
from torch import Tensor

from betaclip.data.batches import PADDING, PHRASE
from betaclip.model.texts import RaggedTexts

PAD = 0  # the token "!", with which the released code fills rows of tokens

_Text = tuple[Tensor, int]  # tokens and level


def pad_as_published(texts: RaggedTexts, end_token: int) -> RaggedTexts:
    """Fill up each image's sentences and phrases with padding texts, to the largest numbers that any image has.

    The released code lays the captions and sentences of B images out as (B, S, L) tokens and their phrases as
    (B, P, L'), fills both with zeros and sets the last column of the first to the end token. Its text tower reads a row
    at the first of its largest tokens. A padding row of sentences is therefore a text of L - 1 zeros and the end token,
    where L is the length of the longest caption or sentence; a padding row of phrases is a text of a single zero.

    Args:
        texts: of one batch, with their levels.
        end_token: the largest of the vocabulary.

    Returns:
        B * (S + P) texts: those given, and padding texts of level PADDING behind an image's sentences and its phrases.

    Raises:
        ValueError: the levels are not known.

    Example:
        >>> from betaclip.data.padding import pad_as_published
        >>> from betaclip.model.texts import RaggedTexts
        >>> tokens = [[[7, 1, 2, 9], [7, 1, 9], [7, 2, 9]], [[7, 3, 9], [7, 4, 9]]]
        >>> texts = RaggedTexts.of(tokens, [[0, 1, 1], [0, 2]])  # a caption with two sentences, and one with a phrase
        >>> padded = pad_as_published(texts, end_token=9)
        >>> padded.counts.tolist(), padded.levels.tolist()
        ([4, 4], [0, 1, 1, -1, 0, -1, -1, 2])
        >>> [ids.tolist() for ids in padded.tokens.split(padded.lengths.tolist())][3:6]
        [[0], [7, 3, 9], [0, 0, 0, 9]]
    """
    if texts.levels is None:
        raise ValueError("levels: expected the level of each text, on which its padding depends, got None")
    rows = zip(texts.tokens.split(texts.lengths.tolist()), texts.levels.tolist(), strict=True)
    images = [list(islice(rows, count)) for count in texts.counts.tolist()]
    sentences, phrases = (
        [[text for text in image if (text[1] == PHRASE) is wanted] for image in images] for wanted in (False, True)
    )
    padding = torch.full((max((len(ids) for image in sentences for ids, _ in image), default=1),), PAD, device="cpu")
    padding[-1] = end_token
    blocks = _filled(sentences, (padding, PADDING)), _filled(phrases, (padding.new_full((1,), PAD), PADDING))
    padded = [first + second for first, second in zip(*blocks, strict=True)]
    return RaggedTexts.of(
        ([ids for ids, _ in image] for image in padded), ([level for _, level in image] for image in padded)
    )


def _filled(images: list[list[_Text]], padding: _Text) -> list[list[_Text]]:
    most = max(map(len, images), default=0)
    return [image + [padding] * (most - len(image)) for image in images]

"""Divides a batch into micro-batches of about as many tokens, since texts differ in length and number."""

import torch

from betaclip.data.batches import Batch


def tokens_per_image(batch: Batch, patches: int) -> list[int]:
    """The number of tokens that the towers see of each image: its patches and class token, and all tokens of its texts.

    Prefixes that texts share are encoded once, so this is the most that there can be.
    """
    texts = batch.texts
    of_texts = torch.zeros(texts.num_images, dtype=torch.int64, device="cpu")
    of_texts.index_add_(0, texts.image_index, texts.lengths)
    return [patches + 1 + tokens for tokens in of_texts.tolist()]


def token_bounds(tokens: list[int], limit: int) -> list[int]:
    """Where consecutive images are divided, so that each part has at most ``limit`` tokens, or is a single image.

    Returns:
        The index of each part's first image, and the number of images.

    Example:
        >>> from betaclip.training.micro_batches import token_bounds
        >>> token_bounds([30, 50, 40, 120, 10], limit=100)
        [0, 2, 3, 4, 5]
    """
    bounds, filled = [0], 0
    for image, count in enumerate(tokens):
        if filled and filled + count > limit:
            bounds.append(image)
            filled = 0
        filled += count
    return [*bounds, len(tokens)]

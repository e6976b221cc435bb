"""Chosen pairs of images and texts, in the order in which they are scored: image by image, in chunks of bounded memory.

The plan is made on the CPU, from the numbers of the chosen images alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Budget(NamedTuple):
    """Bytes of a chunk, of each of its pairs, and of the patches of each of its images."""

    chunk: int
    pair: int
    image: int

    def texts(self) -> int:
        """How many texts an image is scored with at a time, at most."""
        return max(1, (self.chunk - self.image) // self.pair)

    def images(self, texts: int) -> int:
        """How many images are scored at a time, each with ``texts`` texts."""
        return max(1, self.chunk // (texts * self.pair + self.image))


class PairChunks(NamedTuple):
    """The plan: which images are scored together, each with which texts.

    used: (U,) int64 numbers of the images that are chosen at all, ascending.
    sizes: how many consecutive ones of them are scored together; their sum is U.
    texts: for each size b, one or more (b, q) int64 of the texts that are scored at a time; 0 in empty slots.
    place: (M, J) int64 where each pair is among the slots of all chunks; their number for a pair that is left out.
    """

    used: Tensor
    sizes: list[int]
    texts: list[list[Tensor]]
    place: Tensor


def plan_pairs(images: Tensor, num_images: int, valid: Tensor | None, budget: Budget) -> PairChunks:
    """Plan the pairs of text m and image ``images[m, j]``.

    Args:
        images: (M, J) int64 on the CPU, from 0 to num_images - 1.
        valid: (M,) bool on the CPU, False for texts whose pairs are left out.
    """
    pairs = torch.arange(images.numel(), device="cpu")
    if valid is not None:
        pairs = pairs[valid.repeat_interleave(images.shape[1])]
    image, order = images.flatten()[pairs].sort(stable=True)
    pairs = pairs[order]
    used, counts = image.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty(images.numel(), dtype=torch.int64, device="cpu")
    sizes, texts, slots, first = [], [], 0, 0
    for size, most in _sizes(counts.tolist(), budget):
        pieces = []
        for lo in range(0, most, budget.texts()):
            column = torch.arange(lo, min(lo + budget.texts(), most), device="cpu")
            exists = column < counts[first : first + size, None]
            pair = pairs[torch.where(exists, starts[first : first + size, None] + column, 0)]
            pieces.append(torch.where(exists, pair // images.shape[1], 0))
            place[pair[exists]] = slots + exists.flatten().nonzero().flatten()
            slots += exists.numel()
        sizes.append(size)
        texts.append(pieces)
        first += size
    if valid is not None:
        place.view(images.shape)[~valid] = slots
    return PairChunks(used, sizes, texts, place.view(images.shape))


def _sizes(counts: list[int], budget: Budget) -> Iterator[tuple[int, int]]:
    """How many consecutive images are scored together, and the largest number of texts of any of them, from the number
    of each. At most half of their slots stay empty."""
    size = most = total = 0
    for count in counts:
        largest = max(most, count)
        if size and (size >= budget.images(largest) or (size + 1) * largest > 2 * (total + count)):
            yield size, most
            size, most, total = 0, 0, 0
            largest = count
        size, most, total = size + 1, largest, total + count
    if size:
        yield size, most

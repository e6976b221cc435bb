"""Ranks in retrieval: of a text's image among all images, and of an image's text among all texts.

Scores come in blocks: some of this process's images with the texts of all processes. A block serves both directions,
and each pair is scored by the process that has its image. An image may have several texts: each of them retrieves it,
and it retrieves the best of them. Candidates that score as high as the right one, or NaN, are placed before it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

RECALLS_AT = (1, 5, 10)
MAX_PAIRS = 2**22  # pairs that are scored at a time

# (hi - lo, M) scores of this rank's images lo to hi with the M texts of all ranks.
Scores = Callable[[int, int], Tensor]


def cosines(images: Tensor, texts: Tensor) -> Scores:
    """Cosines of (n, D) image embeddings and (M, D) text embeddings of any norm.

    Products in float64, rounded to float32: equal embeddings score alike wherever they stand in a block.
    """
    images, texts = (F.normalize(e.double(), dim=-1) for e in (images, texts))
    return lambda lo, hi: (images[lo:hi] @ texts.T).float()


def retrieval_ranks(
    scores: Scores,
    images: int,
    image_of_text: Tensor,
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    max_pairs: int = MAX_PAIRS,
) -> tuple[Tensor, Tensor]:
    """The places, from 1, of each text's image among all images and of each image's best text among others' texts.

    Args:
        scores: the scores of this rank's images with all texts.
        images: number of images that this rank has; the images of all ranks are numbered in the order of the ranks.
        image_of_text: (M,) int64, the image of each text of all ranks; every image has at least one text.
        max_pairs: number of scores computed at a time.

    Returns:
        (M,) int64 for the texts of all ranks, and (images,) int64 for the images of this rank.

    Raises:
        ValueError: an image has no text, or a text no image.
    """
    device, count = image_of_text.device, len(image_of_text)
    numbers = process_group.gather_rows(torch.full((1,), images, device=device))
    first, total = int(numbers[: process_group.rank].sum()), int(numbers.sum())
    if not torch.equal(image_of_text.unique(), torch.arange(total, device=device)):
        raise ValueError(f"image_of_text: expected every number below {total}, the images of all ranks, and no other")
    rows = max(1, max_pairs // max(1, count))
    blocks = [(lo, min(images, lo + rows)) for lo in range(0, images, rows)]

    def own(lo: int, hi: int) -> Tensor:
        """Whether a text belongs to an image, (hi - lo, M) bool."""
        return image_of_text == torch.arange(first + lo, first + hi, device=device)[:, None]

    of_text = torch.full((count,), -torch.inf, device=device)
    of_image = torch.full((images,), -torch.inf, device=device)
    for lo, hi in blocks:
        block = scores(lo, hi)
        right = block.masked_fill(block.isnan() | ~own(lo, hi), -torch.inf)
        of_text, of_image[lo:hi] = torch.maximum(of_text, right.amax(0)), right.amax(1)
    of_text = process_group.max(of_text)

    before_image = torch.zeros(count, dtype=torch.int64, device=device)
    before_text = torch.zeros(images, dtype=torch.int64, device=device)
    for lo, hi in blocks:
        block, other = scores(lo, hi), ~own(lo, hi)
        # Not "block >= right": NaN counts as better.
        before_image += (~(block < of_text) & other).sum(0)
        before_text[lo:hi] = (~(block < of_image[lo:hi, None]) & other).sum(1)
    return 1 + process_group.sum(before_image), 1 + before_text


def recalls(
    scores: Scores,
    images: int,
    image_of_text: Tensor,
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    max_pairs: int = MAX_PAIRS,
) -> dict[str, float]:
    """The shares of :func:`recalls_of` by some scores. The arguments are those of :func:`retrieval_ranks`."""
    ranks = retrieval_ranks(scores, images, image_of_text, process_group, max_pairs=max_pairs)
    return recalls_of(ranks, process_group)


def recalls_of(ranks: tuple[Tensor, Tensor], process_group: ProcessGroup = SINGLE_PROCESS) -> dict[str, float]:
    """The share of texts whose image is among the first 1, 5, 10 ("t2i_r1" …), and of images with one of their texts
    among these ("i2t_r1" …), from the ranks that :func:`retrieval_ranks` returns; over all ranks, on every rank."""
    text_to_image, image_to_text = ranks
    directions = (("t2i", text_to_image), ("i2t", process_group.gather_rows(image_to_text)))
    return {f"{name}_r{k}": float((ranks <= k).double().mean()) for name, ranks in directions for k in RECALLS_AT}

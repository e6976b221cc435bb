"""Retrieval: the rank of a text's image among all images, and of an image's text among all texts.

Scores come in blocks: some of this process's images with the texts of all processes. A block serves both directions,
and each pair is scored by the process that has its image. An image may have several texts: each of them retrieves it,
and it retrieves the best of them. Candidates that score as high as the right one, or NaN, are placed before it.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.evaluation.encode import (
    NoPicturesError,
    Source,
    Transform,
    batches,
    encode_images,
    encode_texts,
    evaluating,
    read_pictures,
)
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
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
    """The share of texts whose image is among the first 1, 5, 10 ("t2i_r1" …), and of images with one of their texts
    among these ("i2t_r1" …); over all ranks, on every rank. The arguments are those of :func:`retrieval_ranks`."""
    text_to_image, image_to_text = retrieval_ranks(scores, images, image_of_text, process_group, max_pairs=max_pairs)
    directions = (("t2i", text_to_image), ("i2t", process_group.gather_rows(image_to_text)))
    return {f"{name}_r{k}": float((ranks <= k).double().mean()) for name, ranks in directions for k in RECALLS_AT}


def texts_of_pictures(pairs: Iterable[tuple[Path, str]]) -> list[tuple[Path, list[str]]]:
    """Each picture once, with all its texts."""
    texts: dict[Path, list[str]] = {}
    for picture, text in pairs:
        texts.setdefault(picture, []).append(text)
    return list(texts.items())


def retrieval(
    model: BetaCLIP,
    tokenizer: Tokenizer,
    pictures: Sequence[tuple[Source, Sequence[str]]],
    transform: Transform,
    *,
    conditioned: bool,
    batch_size: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Recalls by the cosines of texts with CLS embeddings; with ``conditioned`` also ("conditioned_t2i_r1" …) by the
    cosines of texts with the image embeddings that they condition, for all pairs.

    A picture that cannot be read is left out with its texts. Besides all texts' embeddings, a rank holds a row of
    scores for each of its pictures, and the patches of one batch.

    Returns:
        the recalls, the numbers of "images" and "texts" behind them, and that of "left_out" pictures; over all ranks,
        on every rank.

    Raises:
        NoPicturesError: none of the pictures can be read.
    """
    share = process_group.shard_range(len(pictures))
    mine = pictures[share.start : share.stop]
    device = model.logit_scale.device
    read: list[bool] = []
    with evaluating(model):
        text_embeds = encode_texts(model, tokenizer, [text for _, texts in mine for text in texts], batch_size)
        text_embeds = process_group.gather_rows(text_embeds)
        image_embeds = text_embeds.new_empty(len(mine), model.embed_dim)
        matrix = torch.empty(len(mine) if conditioned else 0, len(text_embeds), device="cpu")
        found = read_pictures((picture for picture, _ in mine), transform, 2 * batch_size)
        for batch in batches(found, batch_size):
            images = [picture[0] for picture in batch if picture is not None]
            rows = slice(sum(read), sum(read) + len(images))
            read += [picture is not None for picture in batch]
            if images:
                image_embeds[rows], patches = encode_images(model, images)
                if conditioned:
                    matrix[rows] = model.pool.score(patches, text_embeds).cpu()
    # Pictures are numbered anew, without those that could not be read.
    usable = process_group.gather_rows(torch.tensor(read, dtype=torch.bool, device=device))
    if not usable.any():
        raise NoPicturesError(f"none of {len(pictures)} pictures could be read")
    counts = torch.tensor([len(texts) for _, texts in pictures], device=device)
    kept = usable.repeat_interleave(counts)
    image_of_text = (usable.cumsum(0) - 1).repeat_interleave(counts)[kept]
    own = sum(read)
    result = {"images": float(usable.sum()), "texts": float(kept.sum()), "left_out": float((~usable).sum())}
    result |= recalls(cosines(image_embeds[:own], text_embeds[kept]), own, image_of_text, process_group)
    if conditioned:

        def conditioned_scores(lo: int, hi: int) -> Tensor:
            return matrix[lo:hi].to(device)[:, kept]

        found_by_pooling = recalls(conditioned_scores, own, image_of_text, process_group)
        result |= {f"conditioned_{name}": value for name, value in found_by_pooling.items()}
    return result

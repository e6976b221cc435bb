"""Re-ranking: of the candidates that are nearest by CLS, which are nearest by what a text pools from a picture?

It makes text-conditioned retrieval from many pictures cheap, because only a few pairs are pooled. Its recalls are not
those of all pairs: a candidate that CLS places too far behind is lost.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from betaclip.evaluation.encode import Encoder, encode_images
from betaclip.evaluation.tasks.multiple_choice import cosines_of_pairs
from betaclip.evaluation.tasks.ranking import MAX_PAIRS, Scores, retrieval_ranks
from betaclip.pooling import TextConditionedPool
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

MAX_TEXTS = 256  # that a picture is pooled by at a time


def reranked_ranks(
    model: Encoder,
    pool: TextConditionedPool,
    by_cls: Scores,
    pictures: Iterable[Sequence[Tensor | None]],
    text_embeds: Tensor,
    image_of_text: Tensor,
    images: int,
    top_k: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """Rank as :func:`~betaclip.evaluation.tasks.ranking.retrieval_ranks` does, but order the ``top_k`` candidates that
    are nearest by CLS by their text-conditioned cosines, and put all others last.

    Candidates that are as near as the last of the ``top_k`` are ordered with them, so that ties decide nothing.

    Args:
        pool: the model's.
        by_cls: scores of this rank's images with all texts.
        pictures: these images in batches, (3, S, S) each; None for one that can no longer be read.
        text_embeds: (M, D), of all ranks.
        image_of_text: (M,) int64, the image of each text of all ranks.
        images: number of images that this rank has.
        top_k: for a text the number of images, for an image the number of texts.
    """
    lowest_for_texts = _lowest_of_nearest(by_cls, images, len(text_embeds), top_k, process_group)
    scores = torch.full((images, len(text_embeds)), -torch.inf, device="cpu")
    lowest_for_images = torch.full((images, 1), -torch.inf, device=text_embeds.device)
    hi = 0
    for batch in pictures:
        lo, hi = hi, hi + len(batch)
        near = by_cls(lo, hi)
        lowest_for_images[lo:hi] = near.topk(min(top_k, near.shape[1])).values[:, -1:]
        # Not "near >= ...": NaN is scored, and counts as better than the right one.
        wanted = ~((near < lowest_for_texts) & (near < lowest_for_images[lo:hi]))
        readable = [i for i, picture in enumerate(batch) if picture is not None]
        if readable:
            _, patches = encode_images(model, [picture for picture in batch if picture is not None])
            rows = torch.tensor(readable)
            found = _scores_of_pairs(pool, patches, text_embeds, wanted[rows.to(wanted.device)])
            scores[lo + rows] = found.cpu()

    def among(lowest: Tensor, by_image: bool) -> Scores:
        def block(lo: int, hi: int) -> Tensor:
            limit = lowest[lo:hi] if by_image else lowest
            return scores[lo:hi].to(limit.device).masked_fill(by_cls(lo, hi) < limit, -torch.inf)

        return block

    text_to_image, _ = retrieval_ranks(among(lowest_for_texts, False), images, image_of_text, process_group)
    _, image_to_text = retrieval_ranks(among(lowest_for_images, True), images, image_of_text, process_group)
    return text_to_image, image_to_text


def _lowest_of_nearest(by_cls: Scores, images: int, texts: int, top_k: int, process_group: ProcessGroup) -> Tensor:
    """(texts,) the lowest score of the ``top_k`` images of all ranks that are nearest to each text."""
    best = by_cls(0, 0)
    rows = max(1, MAX_PAIRS // max(1, texts))
    for lo in range(0, images, rows):
        block = torch.cat((best, by_cls(lo, min(images, lo + rows))))
        best = block.topk(min(top_k, len(block)), dim=0).values
    best = process_group.gather_rows(best)
    return best.topk(min(top_k, len(best)), dim=0).values[-1]


def _scores_of_pairs(pool: TextConditionedPool, patches: Tensor, texts: Tensor, wanted: Tensor) -> Tensor:
    """(B, M) cosines of texts with what they pool from pictures, -inf for pairs that are not wanted.

    patches: (B, P, D); texts: (M, D); wanted: (B, M) bool.
    """
    scores = torch.full(wanted.shape, -torch.inf, device=texts.device)
    chosen = wanted.int().argsort(dim=1, descending=True, stable=True)[:, : int(wanted.sum(1).max())]
    for columns in chosen.split(MAX_TEXTS, dim=1):
        queries = texts[columns]
        scores.scatter_(1, columns, cosines_of_pairs(pool(patches, queries), queries))
    return scores.masked_fill_(~wanted, -torch.inf)

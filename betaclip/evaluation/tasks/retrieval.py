"""Retrieval of pictures by texts and of texts by pictures, by CLS embeddings and by what texts pool from pictures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from betaclip.evaluation.encode import (
    Encoder,
    NoPicturesError,
    Source,
    Tokenize,
    Transform,
    batches,
    encode_images,
    encode_texts,
    evaluating,
    read_pictures,
)
from betaclip.evaluation.tasks.ranking import Scores, cosines, recalls_of, retrieval_ranks
from betaclip.evaluation.tasks.reranking import reranked_ranks
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

Pictures = Sequence[tuple[Source, Sequence[str]]]


def texts_of_pictures(pairs: Iterable[tuple[Path, str]]) -> list[tuple[Path, list[str]]]:
    """Each picture once, with all its texts."""
    texts: dict[Path, list[str]] = {}
    for picture, text in pairs:
        texts.setdefault(picture, []).append(text)
    return list(texts.items())


def retrieval(
    model: Encoder,
    tokenizer: Tokenize,
    pictures: Pictures,
    transform: Transform,
    *,
    conditioned: bool,
    own_text: bool = False,
    top_k: int | None = None,
    batch_size: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Recalls by the cosines of texts with CLS embeddings and, if the model has a pooling block, by those with
    embeddings that texts pool.

    A picture that cannot be read is left out with its texts. Besides all texts' embeddings, a rank holds a row of
    scores for each of its pictures, and the patches of one batch.

    Args:
        conditioned: also ("conditioned_t2i_r1" …) compare each text with what it pools itself, for all pairs.
        own_text: also ("conditioned_own_text_t2i_r1" …) compare all texts with what a picture's own first text pools
            from it, as the released code does. A search does not know which text is a picture's own.
        top_k: also ("conditioned_top128_t2i_r1" … for 128) order the ``top_k`` nearest by CLS as ``conditioned`` orders
            all. At least 10, the largest recall. The pictures are read and encoded once more.

    Returns:
        the recalls, the numbers of "images" and "texts" behind them, and that of "left_out" pictures; over all ranks,
        on every rank.

    Raises:
        NoPicturesError: none of the pictures can be read.
    """
    pool = model.pool
    if pool is None:
        conditioned, own_text = False, False
    share = process_group.shard_range(len(pictures))
    device = model.logit_scale.device
    counts = torch.tensor([len(texts) for _, texts in pictures], dtype=torch.int64, device=device)
    first_texts = (counts.cumsum(0) - counts)[share.start : share.stop]
    mine = pictures[share.start : share.stop]
    with evaluating(model):
        texts = encode_texts(model, tokenizer, [text for _, some in mine for text in some], batch_size)
        texts = process_group.gather_rows(texts)
        found = _encode(model, mine, transform, texts, conditioned, first_texts if own_text else None, batch_size)
        # Pictures are numbered anew, without those that could not be read.
        usable = process_group.gather_rows(torch.tensor(found.read, dtype=torch.bool, device=device))
        if not usable.any():
            raise NoPicturesError(f"none of {len(pictures)} pictures could be read")
        kept = usable.repeat_interleave(counts)
        image_of_text = (usable.cumsum(0) - 1).repeat_interleave(counts)[kept]
        texts, own = texts[kept], sum(found.read)

        def conditioned_scores(lo: int, hi: int) -> Tensor:
            return found.scores[lo:hi].to(device)[:, kept]

        by_cls = cosines(found.image_embeds, texts)
        ways: dict[str, Scores] = {"": by_cls}
        if conditioned:
            ways["conditioned_"] = conditioned_scores
        if own_text:
            ways["conditioned_own_text_"] = cosines(found.pooled_embeds, texts)
        ranks = {way: retrieval_ranks(scores, own, image_of_text, process_group) for way, scores in ways.items()}
        if top_k is not None and pool is not None:
            sources = [source for (source, _), is_read in zip(mine, found.read, strict=True) if is_read]
            again = (picture and picture[0] for picture in read_pictures(sources, transform, 2 * batch_size))
            ranks[f"conditioned_top{top_k}_"] = reranked_ranks(
                model, pool, by_cls, batches(again, batch_size), texts, image_of_text, own, top_k, process_group
            )
    result = {"images": float(usable.sum()), "texts": float(kept.sum()), "left_out": float((~usable).sum())}
    for way, places in ranks.items():
        result |= {way + name: share for name, share in recalls_of(places, process_group).items()}
    return result


@dataclass
class _Encoded:
    """This rank's pictures.

    read: for each picture, whether it could be read; the others follow without those that could not.
    image_embeds: (n, D), of CLS.
    scores: (n, M) text-conditioned cosines, on the CPU; no row if they are not asked for.
    pooled_embeds: (n, D), what each picture's own first text pools from it; no row if they are not asked for.
    """

    read: list[bool]
    image_embeds: Tensor
    scores: Tensor
    pooled_embeds: Tensor


def _encode(
    model: Encoder,
    pictures: Pictures,
    transform: Transform,
    texts: Tensor,
    conditioned: bool,
    own_texts: Tensor | None,
    batch_size: int,
) -> _Encoded:
    """Encode this rank's pictures.

    texts: (M, D), of all ranks.
    own_texts: the number of each picture's first text among them.
    """
    count, read = len(pictures), list[bool]()
    image_embeds = texts.new_empty(count, model.embed_dim)
    scores = torch.empty(count if conditioned else 0, len(texts), device="cpu")
    pooled = texts.new_empty(count if own_texts is not None else 0, model.embed_dim)
    for batch in batches(read_pictures((source for source, _ in pictures), transform, 2 * batch_size), batch_size):
        images = [picture[0] for picture in batch if picture is not None]
        rows, begin = slice(sum(read), sum(read) + len(images)), len(read)
        read += [picture is not None for picture in batch]
        if not images:
            continue
        image_embeds[rows], patches = encode_images(model, images)
        if model.pool is None:
            continue
        if conditioned:
            scores[rows] = model.pool.score(patches, texts).cpu()
        if own_texts is not None:
            numbers = own_texts[begin : len(read)][torch.tensor(read[begin:], device=texts.device)]
            pooled[rows] = model.pool(patches, texts[numbers, None])[:, 0]
    own = sum(read)
    return _Encoded(read, image_embeds[:own], scores[:own], pooled[:own])

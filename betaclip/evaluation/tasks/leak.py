"""The leak: is a text identified from the embedding that it pools from a picture that is not its own?

What is identified from its own picture may be seen there; what is identified from another one was told by the text.
"""

from collections.abc import Sequence

import torch

from betaclip.evaluation.encode import (
    Source,
    Tokenize,
    Transform,
    batches,
    encode_images,
    encode_texts,
    evaluating,
    read_pictures,
)
from betaclip.kernels.precision import unit_rows
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.other_pictures import identified
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup


def leak(
    model: BetaCLIP,
    tokenizer: Tokenize,
    pictures: Sequence[tuple[Source, Sequence[str]]],
    transform: Transform,
    *,
    batch_size: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """The shares of texts that are nearer than all others to the embedding that they pool from their own picture
    ("own_picture") and from the next picture ("other_picture").

    The texts are the first ones of the pictures, equal ones once; a next picture that has an equal text of its own, or
    one that cannot be read, is left out.

    Returns:
        the two shares, the numbers of texts that are behind them ("own_pictures" and "other_pictures"), and the number
        of different "texts"; over all ranks, on every rank. Nothing where no text has another picture.
    """
    first: dict[str, tuple[Source, set[str]]] = {}
    for source, own_texts in pictures:
        first.setdefault(own_texts[0], (source, set(own_texts)))
    texts, chosen = list(first), list(first.values())
    share = process_group.shard_range(len(texts))
    device = model.logit_scale.device
    counts = torch.zeros(4, dtype=torch.float64, device=device)  # identified and asked, of own and of other pictures
    with evaluating(model):
        embeds = encode_texts(model, tokenizer, texts[share.start : share.stop], batch_size)
        embeds = process_group.gather_rows(embeds)
        units, numbers = unit_rows(embeds.float()), torch.arange(len(texts), device=device)
        mine = range(share.start, share.stop)
        found = read_pictures((chosen[i][0] for i in mine), transform, 2 * batch_size)
        for batch in batches(zip(mine, found, strict=True), batch_size):
            readable = [(i, picture[0]) for i, picture in batch if picture is not None]
            if not readable:
                continue
            _, patches = encode_images(model, [image for _, image in readable])
            # Each picture is asked for its own text, and for that of the picture before it.
            asked = torch.tensor([[i, (i - 1) % len(texts)] for i, _ in readable], device=device)
            valid = torch.tensor([[True, texts[i - 1] not in chosen[i][1]] for i, _ in readable], device=device)
            number = asked.flatten()
            pooled = model.pool(patches, embeds[asked]).flatten(0, 1).float()
            right = identified(pooled, units[number], number, units, numbers).view(valid.shape) & valid
            counts += torch.stack((right.sum(0), valid.sum(0)), 1).flatten()
    own_right, own, other_right, other = process_group.sum(counts).tolist()
    if not other:
        return {}
    shares = {"own_picture": own_right / own, "other_picture": other_right / other}
    return {**shares, "own_pictures": own, "other_pictures": other, "texts": float(len(texts))}

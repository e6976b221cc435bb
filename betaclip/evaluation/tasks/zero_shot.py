"""Zero-shot classification: which class's texts are nearest to a picture?

A class's embedding is the mean of the normalised embeddings of its name in all templates, as in open_clip. Classes that
score as high as the right one, or NaN, are placed before it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
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
from betaclip.evaluation.tasks.ranking import cosines
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

Templates = Sequence[Callable[[str], str]]
TemplatesName = Literal["openai", "simple"]

# open_clip's: the 80 of CLIP's paper, and 7 simple ones.
TEMPLATES: dict[TemplatesName, Templates] = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}

TOP = (1, 5)


def class_embeddings(
    model: Encoder, tokenizer: Tokenize, names: Sequence[str], templates: Templates, batch_size: int
) -> Tensor:
    """(C, D) float64: for each of C classes the mean of its texts' normalised embeddings, normalised."""
    texts = [template(name) for name in names for template in templates]
    embeds = F.normalize(encode_texts(model, tokenizer, texts, batch_size).double(), dim=-1)
    return F.normalize(embeds.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def zero_shot_accuracy(
    model: Encoder,
    tokenizer: Tokenize,
    pictures: Sequence[tuple[Source, int]],
    names: Sequence[str],
    templates: Templates,
    transform: Transform,
    *,
    batch_size: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """The share of pictures whose class is the nearest ("top1") and among the five nearest ("top5") to their CLS
    embedding by cosine.

    Args:
        pictures: each with the number of its class.
        names: of the classes.
        templates: functions that make a text of a name.

    Returns:
        these shares; "mean_per_class", the mean of the classes' top1; "chance", that of a guess; the numbers of
        "classes" and of "images" behind them, and that of "left_out" pictures, which could not be read. Over all ranks,
        on every rank.

    Raises:
        NoPicturesError: none of the pictures can be read.
    """
    part, share = process_group.shard_range(len(names)), process_group.shard_range(len(pictures))
    mine = pictures[share.start : share.stop]
    counts = torch.zeros(len(names), len(TOP) + 1, dtype=torch.float64, device=model.logit_scale.device)
    with evaluating(model):
        classes = class_embeddings(model, tokenizer, names[part.start : part.stop], templates, batch_size)
        classes = process_group.gather_rows(classes)
        found = read_pictures((picture for picture, _ in mine), transform, 2 * batch_size)
        for batch in batches(zip(mine, found, strict=True), batch_size):
            readable = [(number, picture[0]) for (_, number), picture in batch if picture is not None]
            if readable:
                right = torch.tensor([number for number, _ in readable], device=counts.device)
                embeds, _ = encode_images(model, [image for _, image in readable])
                counts.index_add_(0, right, _answers(cosines(embeds, classes)(0, len(right)), right))
    counts = process_group.sum(counts)
    number = counts[:, -1]
    if not number.any():
        raise NoPicturesError(f"none of {len(pictures)} pictures could be read")
    tops = {f"top{k}": float(counts[:, i].sum() / number.sum()) for i, k in enumerate(TOP)}
    return tops | {
        "mean_per_class": float((counts[:, 0] / number)[number > 0].mean()),
        "chance": 1 / len(names),
        "classes": float(len(names)),
        "images": float(number.sum()),
        "left_out": float(len(pictures) - number.sum()),
    }


def _answers(scores: Tensor, right: Tensor) -> Tensor:
    """Whether the right class is among the first 1 and 5, and 1, from (B, C) scores: (B, 3) float64."""
    before = (~(scores < scores.gather(1, right[:, None]))).sum(1) - 1  # without itself
    columns = [before < k for k in TOP]
    return torch.stack([*columns, torch.ones_like(columns[0])], dim=1).double()

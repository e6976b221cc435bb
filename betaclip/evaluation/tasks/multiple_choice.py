"""Fine-grained choices: does the model prefer the true text of a region to texts that describe it wrongly?

The procedure is FG-OVD's for CLIP models: squash the picture to the model's square, take RoIAlign of the projected
patches over the box, and compare its cosines with all candidates; an answer is right if the true text is strictly best.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.data.multiple_choice import Choice
from betaclip.evaluation.encode import (
    Encoder,
    NoPicturesError,
    Picture,
    Source,
    Squash,
    Tokenize,
    batches,
    encode_images,
    encode_slots,
    evaluating,
    read_pictures,
)
from betaclip.evaluation.regions import on_grid, region_features
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

Questions = Sequence[tuple[str, Choice]]  # each with the name under which it is counted
# The counts that are kept for each name.
COLUMNS = RIGHT_BY_REGION, RIGHT_BY_POOLING, RIGHT_BY_CHANCE, ANSWERED, LEFT_OUT = range(5)


def first_is_best(scores: Tensor, valid: Tensor) -> Tensor:
    """Whether the first of each row is strictly above all other valid ones, (Q,) bool; NaN is above and below nothing.

    scores: (Q, K); valid: (Q, K) bool.
    """
    return ((scores[:, :1] > scores) | ~valid)[:, 1:].all(1)


def cosines_of_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (...) of (..., D) and (..., D), computed in float64 and rounded to float32: equal embeddings tie."""
    return (F.normalize(a.double(), dim=-1) * F.normalize(b.double(), dim=-1)).sum(-1).float()


def choose(
    model: Encoder, patches: Tensor, image_of_question: Tensor, boxes: Tensor, texts: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Whether a question's first candidate is preferred, (Q,) bool each: by its cosine with the region's feature, and,
    if the model has a pooling block, by its cosine with the embedding that it pools from the whole picture.

    Args:
        patches: (B, P, D).
        image_of_question: (Q,) int64.
        boxes: (Q, 4) in units of patches.
        texts: (Q, K, D) candidates.
        valid: (Q, K) bool.
    """
    regions = region_features(patches, model.patch_grid, boxes, image_of_question)
    by_region = first_is_best(cosines_of_pairs(regions[:, None], texts), valid)
    if model.pool is None:
        return by_region, None
    conditioned = model.pool(patches[image_of_question], texts)
    return by_region, first_is_best(cosines_of_pairs(conditioned, texts), valid)


def choice_accuracy(
    model: Encoder,
    tokenizer: Tokenize,
    choices: Questions,
    *,
    batch_size: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Accuracies over the questions of each name; consecutive questions that share a picture share its encoding.

    Returns:
        for each name ("hard", for example) the accuracy by region features; "hard_conditioned", the one by
        text-conditioned embeddings, if the model has a pooling block; "hard_chance", that of a guess; "hard_questions",
        the number of questions behind these; "hard_left_out", the number of those whose picture could not be read.
        Over all ranks, on every rank.

    Raises:
        NoPicturesError: none of the pictures of a name could be read.
        ValueError: a question has no negatives.
    """
    if any(not choice.negatives for _, choice in choices):
        raise ValueError("choices: expected at least one negative for each question")
    row = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in choices))}
    share = process_group.shard_range(len(choices))
    counts = torch.zeros(len(row), len(COLUMNS), dtype=torch.float64, device=model.logit_scale.device)
    with evaluating(model):
        for some, pictures in _with_pictures(choices[share.start : share.stop], Squash(model.image_size), batch_size):
            readable = [(name, choice) for name, choice in some if _key(choice.image) in pictures]
            for name, choice in some:
                counts[row[name], LEFT_OUT] += _key(choice.image) not in pictures
            if readable:
                rows = torch.tensor([row[name] for name, _ in readable], device=counts.device)
                counts.index_add_(0, rows, _answers(model, tokenizer, [choice for _, choice in readable], pictures))
    return _accuracies(dict(zip(row, process_group.sum(counts).tolist(), strict=True)), model.pool is not None)


def _with_pictures(
    choices: Questions, transform: Squash, batch_size: int
) -> Iterator[tuple[Questions, dict[Hashable, Picture]]]:
    """Batches of questions, each with its pictures, read once; pictures that cannot be read are missing."""
    plan = [(some, {_key(c.image): c.image for _, c in some}) for some in batches(choices, batch_size)]
    sources: Iterator[Source] = (source for _, pictures in plan for source in pictures.values())
    found = read_pictures(sources, transform, 2 * batch_size, upright=False)
    for some, pictures in plan:
        read = zip(pictures, islice(found, len(pictures)), strict=True)
        yield some, {key: picture for key, picture in read if picture is not None}


def _answers(
    model: Encoder, tokenizer: Tokenize, choices: Sequence[Choice], pictures: dict[Hashable, Picture]
) -> Tensor:
    """Each question's contribution to the counts, (Q, columns) float64."""
    keys = [_key(choice.image) for choice in choices]
    number = {key: i for i, key in enumerate(pictures)}
    device = model.logit_scale.device
    _, patches = encode_images(model, [picture for picture, _ in pictures.values()])
    texts, valid = encode_slots(model, tokenizer, [(choice.positive, *choice.negatives) for choice in choices])
    boxes = on_grid([choice.box for choice in choices], [pictures[key][1] for key in keys], model.patch_grid)
    image_of_question = torch.tensor([number[key] for key in keys], device=device)
    answers = torch.zeros(len(choices), len(COLUMNS), dtype=torch.float64, device=device)
    right = choose(model, patches, image_of_question, boxes.to(device), texts, valid)
    for column, answer in zip((RIGHT_BY_REGION, RIGHT_BY_POOLING), right, strict=True):
        if answer is not None:
            answers[:, column] = answer.double()
    answers[:, RIGHT_BY_CHANCE] = 1 / valid.sum(1)
    answers[:, ANSWERED] = 1
    return answers


def _accuracies(counts: dict[str, list[float]], pooled: bool) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, values in counts.items():
        answered, left_out = values[ANSWERED], values[LEFT_OUT]
        if not answered:
            raise NoPicturesError(f"{name}: no picture of {left_out:.0f} questions could be read")
        result |= {
            name: values[RIGHT_BY_REGION] / answered,
            **({f"{name}_conditioned": values[RIGHT_BY_POOLING] / answered} if pooled else {}),
            f"{name}_chance": values[RIGHT_BY_CHANCE] / answered,
            f"{name}_questions": answered,
            f"{name}_left_out": left_out,
        }
    return result


def _key(source: Source) -> Hashable:
    return source if isinstance(source, Path) else id(source)

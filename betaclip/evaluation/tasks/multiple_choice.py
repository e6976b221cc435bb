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


def candidate_scores(
    model: Encoder, patches: Tensor, image_of_question: Tensor, boxes: Tensor, texts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The cosines of each candidate, (Q, K) each: with the region's feature, and, if the model has a pooling block,
    with the embedding that it pools from the whole picture.

    Args:
        patches: (B, P, D).
        image_of_question: (Q,) int64.
        boxes: (Q, 4) in units of patches.
        texts: (Q, K, D) candidates.
    """
    regions = region_features(patches, model.patch_grid, boxes, image_of_question)
    by_region = cosines_of_pairs(regions[:, None], texts)
    if model.pool is None:
        return by_region, None
    conditioned = model.pool(patches[image_of_question], texts)
    return by_region, cosines_of_pairs(conditioned, texts)


def choose(
    model: Encoder, patches: Tensor, image_of_question: Tensor, boxes: Tensor, texts: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Whether a question's first candidate is preferred, (Q,) bool each: by region and, if the model has a pooling
    block, by pooling, as :func:`candidate_scores` takes them; valid: (Q, K) bool."""
    by_region, by_pooling = candidate_scores(model, patches, image_of_question, boxes, texts)
    return first_is_best(by_region, valid), None if by_pooling is None else first_is_best(by_pooling, valid)


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


def wrong_answers(
    model: Encoder, tokenizer: Tokenize, choices: Sequence[Choice], *, batch_size: int
) -> Iterator[tuple[int, str]]:
    """The number of each question that the model answers wrong by region features, and the negative that it prefers.

    Questions whose picture cannot be read are left out. A batch of questions is answered when its turn comes.
    """
    named = [(str(number), choice) for number, choice in enumerate(choices)]
    for some, pictures in _with_pictures(named, Squash(model.image_size), batch_size):
        readable = [(int(number), choice) for number, choice in some if _key(choice.image) in pictures]
        if not readable:
            continue
        with evaluating(model):
            *inputs, valid = _questions(model, tokenizer, [choice for _, choice in readable], pictures)
            scores, _ = candidate_scores(model, *inputs)
        right = first_is_best(scores, valid).tolist()
        best = scores.masked_fill(~valid, -torch.inf)[:, 1:].argmax(1).tolist()
        yield from (
            (number, choice.negatives[preferred])
            for (number, choice), is_right, preferred in zip(readable, right, best, strict=True)
            if not is_right
        )


def _answers(
    model: Encoder, tokenizer: Tokenize, choices: Sequence[Choice], pictures: dict[Hashable, Picture]
) -> Tensor:
    """Each question's contribution to the counts, (Q, columns) float64."""
    patches, image_of_question, boxes, texts, valid = _questions(model, tokenizer, choices, pictures)
    answers = torch.zeros(len(choices), len(COLUMNS), dtype=torch.float64, device=patches.device)
    right = choose(model, patches, image_of_question, boxes, texts, valid)
    for column, answer in zip((RIGHT_BY_REGION, RIGHT_BY_POOLING), right, strict=True):
        if answer is not None:
            answers[:, column] = answer.double()
    answers[:, RIGHT_BY_CHANCE] = 1 / valid.sum(1)
    answers[:, ANSWERED] = 1
    return answers


def _questions(
    model: Encoder, tokenizer: Tokenize, choices: Sequence[Choice], pictures: dict[Hashable, Picture]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments of :func:`choose` for these questions, without the model."""
    keys = [_key(choice.image) for choice in choices]
    number = {key: i for i, key in enumerate(pictures)}
    device = model.logit_scale.device
    _, patches = encode_images(model, [picture for picture, _ in pictures.values()])
    texts, valid = encode_slots(model, tokenizer, [(choice.positive, *choice.negatives) for choice in choices])
    boxes = on_grid([choice.box for choice in choices], [pictures[key][1] for key in keys], model.patch_grid)
    image_of_question = torch.tensor([number[key] for key in keys], device=device)
    return patches, image_of_question, boxes.to(device), texts, valid


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

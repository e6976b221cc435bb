"""Fine-grained choices: is the true text of a region preferred to texts that say something else of it?

As FG-OVD is evaluated for CLIP models: the picture squashed to the model's square, RoIAlign of the projected patches
over the box, cosines with all candidates; right if the true one is strictly the best.
"""

from collections.abc import Hashable, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.data.multiple_choice import Choice
from betaclip.evaluation.encode import (
    NoPicturesError,
    Source,
    Squash,
    batches,
    encode_images,
    encode_slots,
    evaluating,
    read_pictures,
)
from betaclip.evaluation.regions import on_grid, region_features
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup


def first_is_best(scores: Tensor, valid: Tensor) -> Tensor:
    """(Q,) bool: the first of each row is strictly above all others that are valid; NaN is neither above nor below.

    scores: (Q, K); valid: (Q, K) bool.
    """
    return ((scores[:, :1] > scores) | ~valid)[:, 1:].all(1)


def cosines_of_pairs(a: Tensor, b: Tensor) -> Tensor:
    """(...) of (..., D) and (..., D); computed in float64 and rounded to float32, so that equal embeddings tie."""
    return (F.normalize(a.double(), dim=-1) * F.normalize(b.double(), dim=-1)).sum(-1).float()


def choose(
    model: BetaCLIP, patches: Tensor, image_of_question: Tensor, boxes: Tensor, texts: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """(Q,) bool each, whether the first candidate of a question is preferred: by its cosine with the region's feature,
    and by its cosine with the embedding of the whole picture that it conditions.

    Args:
        patches: (B, P, D).
        image_of_question: (Q,) int64.
        boxes: (Q, 4) in units of patches.
        texts: (Q, K, D) candidates.
        valid: (Q, K) bool.
    """
    regions = region_features(patches, model.patch_grid, boxes, image_of_question)
    conditioned = model.pool(patches[image_of_question], texts)
    by_region, by_pooling = (cosines_of_pairs(e, texts) for e in (regions[:, None], conditioned))
    return first_is_best(by_region, valid), first_is_best(by_pooling, valid)


def choice_accuracy(
    model: BetaCLIP,
    tokenizer: Tokenizer,
    choices: Sequence[tuple[str, Choice]],
    *,
    batch_size: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Accuracies of the questions of each name; neighbours that share a picture share its encoding.

    Returns:
        for each name ("hard", say) the accuracy by region features; "hard_conditioned", by text-conditioned embeddings;
        "hard_chance", that of a guess; "hard_questions" that these are of; "hard_left_out", whose picture could not be
        read. Of all ranks, on every rank.

    Raises:
        NoPicturesError: none of the questions of a name could be read.
        ValueError: a question without negatives.
    """
    if any(not choice.negatives for _, choice in choices):
        raise ValueError("choices: expected at least one negative for each question")
    number = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in choices))}
    part = process_group.shard_range(len(choices))
    plan = [(some, _pictures(some)) for some in batches(choices[part.start : part.stop], batch_size)]
    device = model.logit_scale.device
    # Right by region, right by pooling, right by chance, asked, left out.
    totals = torch.zeros(len(number), 5, dtype=torch.float64, device=device)
    with evaluating(model):
        sources = (picture for _, pictures in plan for picture in pictures.values())
        found = read_pictures(sources, Squash(model.image_size), 2 * batch_size, upright=False)
        for some, pictures in plan:
            read = dict(zip(pictures, islice(found, len(pictures)), strict=True))
            good = {key: picture for key, picture in read.items() if picture is not None}
            asked = [(name, choice) for name, choice in some if _key(choice.image) in good]
            for name, choice in some:
                totals[number[name], 4] += _key(choice.image) not in good
            if not asked:
                continue
            place = {key: i for i, key in enumerate(good)}
            keys = [_key(choice.image) for _, choice in asked]
            _, patches = encode_images(model, [picture for picture, _ in good.values()])
            texts, valid = encode_slots(model, tokenizer, [(c.positive, *c.negatives) for _, c in asked])
            boxes = on_grid([choice.box for _, choice in asked], [good[key][1] for key in keys], model.patch_grid)
            image_of_question = torch.tensor([place[key] for key in keys], device=device)
            right = choose(model, patches, image_of_question, boxes.to(device), texts, valid)
            columns = (*right, 1 / valid.sum(1), torch.ones(len(asked), device=device))
            names = torch.tensor([number[name] for name, _ in asked], device=device)
            totals[:, :4].index_add_(0, names, torch.stack([c.double() for c in columns], 1))
    result: dict[str, float] = {}
    for name, values in zip(number, process_group.sum(totals).tolist(), strict=True):
        region, conditioned, chance, questions, left_out = values
        if not questions:
            raise NoPicturesError(f"{name}: no picture of {left_out:.0f} questions could be read")
        result |= {
            name: region / questions,
            f"{name}_conditioned": conditioned / questions,
            f"{name}_chance": chance / questions,
            f"{name}_questions": questions,
            f"{name}_left_out": left_out,
        }
    return result


def _pictures(choices: Sequence[tuple[str, Choice]]) -> dict[Hashable, Source]:
    """Each picture of these questions once."""
    return {_key(choice.image): choice.image for _, choice in choices}


def _key(source: Source) -> Hashable:
    return source if isinstance(source, Path) else id(source)

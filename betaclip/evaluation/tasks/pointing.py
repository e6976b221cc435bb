"""Pointing: the share of a phrase's attention inside the box of the thing that it names."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from betaclip.data.scenes.dataset import Scene
from betaclip.evaluation.encode import Squash, Tokenize, batches, encode_images, encode_slots, evaluating
from betaclip.evaluation.regions import coverage, on_grid
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup


def mass_in_boxes(attention: Tensor, boxes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The share of the attention to patches that is inside the box, where a patch counts in proportion to its part that
    the box covers, and the box's share of the picture, which is the result for even attention; (N,) each.

    attention: (N, P), of any sums, because a key of zeros may have a part of it; boxes: (N, 4) in units of patches.
    """
    covered = coverage(boxes, grid)
    total = attention.sum(1).clamp_min(torch.finfo(attention.dtype).tiny)
    return (attention * covered).sum(1) / total, covered.mean(1)


def pointing(
    model: BetaCLIP,
    tokenizer: Tokenize,
    scenes: Sequence[Scene],
    *,
    batch_size: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Means over the phrases of all scenes, on every rank: "mass_in_box", "box_share", the "ratio" of the two; and the
    number of "phrases". Attention is averaged over heads.

    Raises:
        ValueError: no scene has a phrase.
    """
    share = process_group.shard_range(len(scenes))
    device, squash = model.logit_scale.device, Squash(model.image_size)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(model):
        for some in batches(scenes[share.start : share.stop], batch_size):
            _, patches = encode_images(model, [squash(Image.fromarray(scene.image)) for scene in some])
            texts, valid = encode_slots(model, tokenizer, [scene.phrases for scene in some])
            attention = model.pool(patches, texts, need_weights=True)[1][valid]
            boxes = [box for scene in some for box in scene.boxes]
            sizes = [scene.image.shape[1::-1] for scene in some for _ in scene.boxes]
            mass, area = mass_in_boxes(attention, on_grid(boxes, sizes, model.patch_grid).to(device), model.patch_grid)
            totals += torch.stack((mass.double().sum(), area.double().sum(), valid.sum()))
    mass_sum, area_sum, phrases = process_group.sum(totals).tolist()
    if not phrases:
        raise ValueError("scenes: expected at least one phrase in all of them, got none")
    return {
        "mass_in_box": mass_sum / phrases,
        "box_share": area_sum / phrases,
        "ratio": mass_sum / area_sum,
        "phrases": phrases,
    }

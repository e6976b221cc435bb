"""Pools the pictures of a batch by texts that are not their own.

In β-CLIP others are chosen by shifts: the texts of image b also pool image b + shift, modulo the number of images. Each
image then serves as many texts as any other, and pools them all in one call. In FLAIR each image pools one text of each
other image, which is drawn for that pair.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip.kernels.precision import accumulation_dtype, autocast_off, unit_rows
from betaclip.model.packing import to_device

_COMPARED = 2**24  # cosines that are held at a time


class Others(NamedTuple):
    """A plan of the pairs of images and texts of other images: the texts of image b pool image b + shift, modulo the
    number of images, for each of J shifts.

    texts: (B, Q) int64, the texts that pool each image, as numbers of slots in row-major order; -1 for none. Q is the
    largest number that any image has, so that fewer places are empty than if each took all K slots of J images.
    place: (B, K, J) int64, the places of each text's J pairs among these B·Q; B·Q for a pair that there is not.
    """

    shifts: Sequence[int]
    texts: Tensor
    place: Tensor

    def to(self, device: torch.device) -> "Others":
        return self._replace(texts=to_device(self.texts, device), place=to_device(self.place, device))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plan_others(filled: Tensor, shifts: Sequence[int]) -> Others:
    """Plan the pairs on the CPU.

    Args:
        filled: (B, K) bool on the CPU, True where there is a text.
        shifts: at least one, none a multiple of B.
    """
    images = len(filled)
    slot = torch.arange(filled.numel(), device="cpu").view(filled.shape).masked_fill(~filled, -1)
    asked = torch.stack([slot.roll(shift, 0) for shift in shifts], 1)  # (B, J, K)
    valid = asked >= 0
    column = valid.flatten(1).cumsum(1).view(asked.shape) - 1
    count = int(valid.flatten(1).sum(1).amax())
    texts = slot.new_full((images, count), -1)
    image = torch.arange(images, device="cpu")[:, None, None]
    texts[image.expand(asked.shape)[valid], column[valid]] = asked[valid]
    place = (image * count + column).masked_fill(~valid, images * count).unbind(1)
    return Others(shifts, texts, torch.stack([p.roll(-shift, 0) for p, shift in zip(place, shifts, strict=True)], 2))


def pool_with_others(
    pool: nn.Module, patches: Tensor, text_embeds: Tensor, filled: Tensor, others: Others
) -> tuple[Tensor, Tensor]:
    """Pool each image by its own texts, (B, K, D), and by those of other images, (B, Q, D): in one call, which projects
    patches and texts once."""
    slot = torch.arange(filled.numel(), device=filled.device).view(filled.shape).masked_fill(~filled, -1)
    pooled = pool(patches, text_embeds.flatten(0, 1), texts=torch.cat((slot, others.texts), 1))
    own, for_others = pooled.split((slot.shape[1], others.texts.shape[1]), 1)
    return own.clone(), for_others  # a copy, because FSDP2 warns of outputs that are views


def conditioned_outputs(
    pooled: Tensor, others: Others, text_embeds: Tensor, index: Tensor, mask: Tensor, columns: int
) -> dict[str, Tensor]:
    """The outputs of ``BetaCLIP.forward`` about other pictures.

    Args:
        pooled: (B, Q, D), the images as the texts of others pool them.
        text_embeds: (B, K, D).
        index: (B, K) number of the distinct text in each slot. mask: (B, K) bool, True where there is a text.
        columns: at least J; those beyond J are masked.
    """
    dtype = accumulation_dtype(text_embeds.dtype)
    units, pooled = unit_rows(text_embeds.to(dtype)).flatten(0, 1), unit_rows(pooled.to(dtype))
    cosines = (pooled * F.embedding(others.texts.clamp_min(0), units)).sum(2)
    owned = [(index.unsqueeze(2) == index.roll(-shift, 0).unsqueeze(1)).any(2) for shift in others.shifts]
    valid = mask.unsqueeze(2) & ~torch.stack(owned, 2)
    negatives = F.embedding(others.place, F.pad(cosines.flatten(), (0, 1))[:, None])[..., 0]
    number = index.flatten()
    first = F.embedding(others.place[:, :, 0].flatten(), F.pad(pooled.detach().flatten(0, 1), (0, 0, 0, 1)))
    leak = identified(first, units, number, units, number.masked_fill(~mask.flatten(), -1)).view(mask.shape)
    missing = (0, columns - len(others.shifts))
    return {
        "conditioned_negatives": F.pad(negatives, missing),
        "conditioned_mask": F.pad(valid, missing),
        "conditioned_leak": leak & valid[:, :, 0],
    }


def no_conditioned_outputs(text_embeds: Tensor, mask: Tensor, columns: int) -> dict[str, Tensor]:
    """The outputs of :func:`conditioned_outputs` for texts that have no other picture."""
    negatives = text_embeds.new_zeros(*mask.shape, columns, dtype=accumulation_dtype(text_embeds.dtype))
    valid, leak = torch.zeros_like(negatives, dtype=torch.bool), torch.zeros_like(mask)
    return {"conditioned_negatives": negatives, "conditioned_mask": valid, "conditioned_leak": leak}


def sampled_texts(own: Tensor, other: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The texts to score each image with: its own, and one of each other image, as numbers of slots in row-major order.

    Args:
        own: (B, K) numbers of the slots. other: (B, J) int64 those of the others' texts, below 0 for none.
        index: (B, K) number of the distinct text in each slot. mask: (B, K) bool, True where there is a text.

    Returns:
        (B, K + J) numbers, below 0 for none; and the same as bool, True where there is a text. Texts of others that
        equal one of the image's own are left out.
    """
    slots = other.clamp_min(0)
    owned = (index.flatten()[slots].unsqueeze(2) == index.masked_fill(~mask, -1).unsqueeze(1)).any(2)
    valid = torch.cat((mask, (other >= 0) & mask.flatten()[slots] & ~owned), 1)
    return torch.cat((own, other), 1).masked_fill(~valid, -1), valid


@torch.no_grad()
def identified(embeds: Tensor, own: Tensor, number: Tensor, texts: Tensor, numbers: Tensor) -> Tensor:
    """Whether the text that conditioned an embedding is nearer to it than all different texts, (N,) bool.

    Args:
        embeds: (N, D) of any norm. own: (N, D) unit vectors, the text of each. number: (N,) that text's number.
        texts: (M, D) unit vectors to compare with. numbers: (M,), equal for equal texts; negative ones are left out.
    """
    found = []
    with autocast_off(embeds.device.type):  # rounded cosines would tie
        rows = max(1, _COMPARED // max(1, len(texts)))
        for x, t, n in zip(embeds.split(rows), own.split(rows), number.split(rows), strict=True):
            # Not "cosines >= own": NaN counts as nearer.
            nearer = ~(x @ texts.T < (x * t).sum(1, keepdim=True))
            found.append(~(nearer & (numbers >= 0) & (numbers != n.unsqueeze(1))).any(1))
    return torch.cat(found)

"""Pools the pictures of a batch by texts that are not their own.

In β-CLIP others are chosen by shifts: the texts of image b also pool image b + shift, modulo the number of images. Each
image then serves as many texts as any other, and pools them all in one call. In FLAIR each image pools one text of each
other image, which is drawn for that pair.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip.kernels.precision import accumulation_dtype, autocast_off, unit_rows

_COMPARED = 2**24  # cosines that are held at a time


def pool_with_others(
    pool: nn.Module, patches: Tensor, text_embeds: Tensor, mask: Tensor, shifts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Pool each image by its own texts, (B, K, D), and for each shift in turn by the texts of the image whose other
    picture it is, (B, J K, D): in one call, so that patches are projected once."""
    if not shifts:
        return pool(patches, text_embeds, query_mask=mask), text_embeds[:, :0]
    asked, exists = (torch.cat([t, *(t.roll(shift, 0) for shift in shifts)], 1) for t in (text_embeds, mask))
    pooled = pool(patches, asked, query_mask=exists)
    own, others = pooled.split((mask.shape[1], len(shifts) * mask.shape[1]), 1)
    return own.clone(), others  # a copy, because FSDP2 warns of outputs that are views


def conditioned_outputs(
    pooled: Tensor, text_embeds: Tensor, index: Tensor, mask: Tensor, shifts: Sequence[int], columns: int
) -> dict[str, Tensor]:
    """The outputs of ``BetaCLIP.forward`` about other pictures.

    Args:
        pooled: (B, J K, D), without the images' own texts, in the order of :func:`pool_with_others`.
        text_embeds: (B, K, D).
        index: (B, K) number of the distinct text in each slot. mask: (B, K) bool, True where there is a text.
        shifts: J of them, none a multiple of B.
        columns: at least J; those beyond J are masked.
    """
    dtype = accumulation_dtype(text_embeds.dtype)
    units = unit_rows(text_embeds.to(dtype))
    if not shifts:
        negatives = units.new_zeros(*mask.shape, columns)
        valid, leak = torch.zeros_like(negatives, dtype=torch.bool), torch.zeros_like(mask)
    else:
        of_shift = pooled.unflatten(1, (len(shifts), mask.shape[1])).unbind(1)
        others = torch.stack([rows.roll(-shift, 0) for rows, shift in zip(of_shift, shifts, strict=True)], 2)
        others = unit_rows(others.to(dtype))  # (B, K, J, D)
        owned = [(index.unsqueeze(2) == index.roll(-shift, 0).unsqueeze(1)).any(2) for shift in shifts]
        missing = (0, columns - len(shifts))
        negatives = F.pad((others * units.unsqueeze(2)).sum(3), missing)
        valid = F.pad(mask.unsqueeze(2) & ~torch.stack(owned, 2), missing)
        flat, number = units.flatten(0, 1), index.flatten()
        numbers = number.masked_fill(~mask.flatten(), -1)
        leak = identified(others[:, :, 0].flatten(0, 1), flat, number, flat, numbers).view(mask.shape) & valid[:, :, 0]
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

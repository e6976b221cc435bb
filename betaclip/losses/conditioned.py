"""Conditioned negatives: other pictures under the same text.

β-CAL compares the embedding that a text pools from its own picture with all texts. An embedding may then just tell
which text that was, whatever the picture shows, and nothing objects. The embeddings that the same text pools from other
pictures object: if they do not depend on the picture, they are as near to the text as its own.

The softmax form has them in a term of its own, and not in the denominators of β-CAL's text-to-image direction. There
they compete with the texts of the same image, which a β above 0 asks for; in one run on scenes they then changed
nothing (docs/training.md).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.backends import expect
from betaclip.kernels.precision import unit_rows
from betaclip.losses.across_ranks import over_ranks
from betaclip.losses.inputs import DIVISORS, FORMS, Batch, as_scalar, check_choice, check_tensor, prepare
from betaclip.process_group import ProcessGroup


class Conditioned(NamedTuple):
    """Checked cosines (B, K, J) of a text with what it pools from other pictures, and which exist, (B, K, J) bool."""

    cosines: Tensor
    valid: Tensor

    def softmax_terms(self, own: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) logsumexp(scale * [own, others]) - scale * own, 0 for texts without another picture, and (B, K) bool,
        which texts have one. own: (B, K) cosines with the own picture."""
        contrasted = self.valid.any(2)
        own = scale * own.masked_fill(~contrasted, 0)
        others = (scale * self.cosines.masked_fill(~self.valid, 0)).masked_fill(~self.valid, -torch.inf)
        return torch.cat((own.unsqueeze(2), others), 2).logsumexp(2) - own, contrasted

    def softplus_sums(self, scale: Tensor, bias: Tensor | None) -> Tensor:
        """(B, K) the sum of softplus(scale * cosine + bias) over the pairs of each text."""
        logits = scale * self.cosines.masked_fill(~self.valid, 0)
        losses = -F.logsigmoid(-logits if bias is None else -logits - bias)  # softplus, which F.softplus rounds
        return losses.masked_fill(~self.valid, 0).sum(2)


def prepare_conditioned(batch: Batch, negatives: Tensor | None, mask: Tensor | None) -> Conditioned | None:
    """Check the cosines and their mask, and bring them into the batch's slots.

    negatives: (B, K, J), or (N, J) if the batch is ragged. mask: bool of the same shape, True = valid.
    """
    if negatives is None:
        if mask is not None:
            raise ValueError("conditioned_mask: expected conditioned_negatives with it, got None")
        return None
    layout = batch.layout
    rows = (layout.images, layout.texts_per_image) if layout.slots is None else (batch.image.shape[0],)
    for name, tensor in (("conditioned_negatives", negatives), ("conditioned_mask", mask)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.dim() != len(rows) + 1 or tensor.shape[:-1] != rows:
            shape = ", ".join(map(str, (*rows, "J")))
            raise ValueError(f"{name}: expected shape ({shape}) as image_embeds, got {tuple(tensor.shape)}")
        expect(name, tensor, "as image_embeds", device=batch.image.device)
    if not negatives.is_floating_point():
        raise ValueError(f"conditioned_negatives: expected floating-point cosines, got {negatives.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != negatives.shape):
        expected = f"bool of shape {tuple(negatives.shape)}, True = valid"
        raise ValueError(f"conditioned_mask: expected {expected}, got {mask.dtype} {tuple(mask.shape)}")
    valid = torch.ones_like(negatives, dtype=torch.bool) if mask is None else mask
    if layout.slots is not None:
        slots = layout.slots.clamp_min(0)
        negatives, valid = negatives[slots], valid[slots]
    if batch.valid is not None:
        valid = valid & batch.valid.unsqueeze(2)
    return Conditioned(negatives.to(batch.scale.dtype), valid)


def conditioned_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    conditioned_negatives: Tensor,
    conditioned_mask: Tensor | None = None,
    *,
    form: str = "ce",
    mask: Tensor | None = None,
    logit_bias: Tensor | float | None = None,
    padding: str = "ignore",
    divisor: str = "pairs",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The term that ``conditioned_negatives`` add to β-CAL at a ``conditioned_weight`` of 1, by itself. The arguments
    are those of :class:`betaclip.BetaCALLoss`; the mean is over the texts of all ranks of ``group``."""
    check_choice("form", form, FORMS)
    check_choice("divisor", divisor, DIVISORS)
    batch = prepare(image_embeds, text_embeds, logit_scale, mask, None, padding)
    conditioned = prepare_conditioned(batch, conditioned_negatives, conditioned_mask)
    assert conditioned is not None
    if form == "ce":
        terms, exist = conditioned.softmax_terms(_own_cosines(batch), batch.scale)
        total, count = over_ranks(terms.sum(), exist.sum(), group)
        return total / count.clamp_min(1)
    bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, batch.image, batch.scale.dtype)
    layout = batch.layout if padding == "ignore" else batch.all_rows()
    rows = (layout.image_id >= 0).sum()
    total, rows = over_ranks(conditioned.softplus_sums(batch.scale, bias).sum(), rows, group)
    return sigmoid_mean(total, rows, divisor)


def sigmoid_mean(total: Tensor, rows: Tensor, divisor: str) -> Tensor:
    """() the sigmoid form's sum, divided by the number of texts () or its square."""
    number = rows.to(total.dtype).clamp_min(1)
    return total / (number if divisor == "rows" else number**2)


def _own_cosines(batch: Batch) -> Tensor:
    """(B, K) cosines of each text with what it pools from its own picture, 0 for padded texts."""
    padded = (batch.layout.image_id < 0).unsqueeze(1)
    image, text = (unit_rows(x.to(batch.scale.dtype).masked_fill(padded, 0)) for x in (batch.image, batch.text))
    return batch.layout.to_slots((image * text).sum(1), 0)

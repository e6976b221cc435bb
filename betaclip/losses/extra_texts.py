"""Extra texts: negatives of every image embedding that belong to no image of the batch.

Hard captions, or texts of earlier updates. They are further columns of the matrix of logits, whose own statistics
nobody needs, so that the operations between images serve them as they are: N rows by E columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from betaclip.kernels.backends import expect
from betaclip.kernels.precision import DTYPES, unit_rows
from betaclip.kernels.similarity.operators import Backend, RowLayout, SoftplusSums, two_sided_logsumexp
from betaclip.losses.inputs import Batch, check_tensor


class ExtraTexts(NamedTuple):
    """Checked extra texts of a batch.

    image, text: (N, D) and (E, D) unit rows in accumulation dtype, 0 for padded ones; D is the length of the longest
    prefix. valid: (E,) bool. text_id: (E,) as the layout's, or None.
    """

    image: Tensor
    text: Tensor
    valid: Tensor
    text_id: Tensor | None

    def logsumexp(self, batch: Batch, layout: RowLayout, backend: Backend, keep: int | str) -> Tensor:
        """(P, N) the log-sum-exp of each image embedding's logits with the extra texts; -inf if there is none."""
        image, text, ids = self._operands(batch, layout)
        options = 0, 0, batch.prefixes.contrasted, batch.dtype, backend
        return two_sided_logsumexp(image, text, batch.scale, *ids, *options, keep=keep)[0]

    def softplus(
        self, batch: Batch, bias: Tensor | None, total: bool, row_weights: Tensor | None, backend: Backend
    ) -> Tensor:
        """The sums of the softplus of each image embedding's logits with the extra texts, as ``contrast_softplus``."""
        image, text, ids = self._operands(batch, batch.layout)
        sums: Tensor = SoftplusSums.apply(
            image,
            text,
            batch.scale,
            bias,
            *ids,
            row_weights,
            total,
            torch.is_grad_enabled(),
            0,
            0,
            batch.prefixes.contrasted,
            batch.dtype,
            backend,
        )[0]
        return sums

    def _operands(self, batch: Batch, layout: RowLayout) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Rows in the dtype of the products; ids and slots. No image of the batch has the id of valid extra texts."""
        image_id = torch.where(self.valid, len(layout.image_id), -1).to(torch.int32)
        ids = layout.image_id, image_id, layout.text_id, self.text_id, None
        return self.image.to(batch.dtype), self.text.to(batch.dtype), ids


def prepare_extra_texts(
    batch: Batch, layout: RowLayout, texts: Tensor | None, mask: Tensor | None, text_id: Tensor | None
) -> ExtraTexts | None:
    """Check the extra texts and their mask."""
    if texts is None:
        if mask is not None:
            raise ValueError("extra_mask: expected extra_texts with it, got None")
        return None
    check_tensor("extra_texts", texts)
    if texts.dim() != 2 or texts.shape[1] != batch.depth:
        raise ValueError(
            f"extra_texts: expected (E, {batch.depth}), D as in image_embeds, got shape {tuple(texts.shape)}"
        )
    if texts.dtype not in DTYPES:
        raise ValueError(f"extra_texts: expected float16, bfloat16, float32 or float64, got {texts.dtype}")
    expect("extra_texts", texts, "as image_embeds", device=batch.image.device)
    if mask is not None:
        check_tensor("extra_mask", mask)
        expect("extra_mask", mask, "as extra_texts", shape=texts.shape[:1], device=texts.device)
        if mask.dtype != torch.bool:
            raise ValueError(f"extra_mask: expected dtype torch.bool (True = valid), got {mask.dtype}")
    valid = torch.ones_like(texts[:, 0], dtype=torch.bool) if mask is None else mask
    image, text = (
        unit_rows(rows.to(batch.scale.dtype).masked_fill(~taken.unsqueeze(1), 0))
        for rows, taken in ((batch.image, layout.image_id >= 0), (batch.prefixes.longest(texts), valid))
    )
    return ExtraTexts(image, text, valid, text_id)

"""CLIP's loss over several ranks with the gradients of the released β-CLIP code."""

import torch
from torch import Tensor

from betaclip.kernels.precision import unit_rows
from betaclip.kernels.similarity import similarity_logsumexp
from betaclip.kernels.similarity.operators import Backend
from betaclip.losses.across_ranks import over_ranks
from betaclip.losses.inputs import prepare
from betaclip.process_group import ProcessGroup


def detached_clip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    group: ProcessGroup,
    *,
    mask: Tensor | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> Tensor:
    """CLIP's loss of the images of all ranks, in which each rank treats what it has gathered as constants.

    The value is that of ``ClipLoss(gather=True)``. The gradients are those of the released code, and of open_clip's
    ``ClipLoss(local_loss=True, gather_with_grad=False)``: an image embedding gets one from its own row of logits, but
    none from the rows of texts in which it is a column; the same holds for texts. On each rank, equivalent to:

        v, t = F.normalize(image_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1)
        all_v, all_t = (torch.cat(all_gather(e.detach())) for e in (v, t))
        own = first_row_of_this_rank + torch.arange(B)
        loss = (F.cross_entropy(logit_scale * v @ all_t.T, own) + F.cross_entropy(logit_scale * t @ all_v.T, own)) / 2

    and the mean over ranks, weighted by their numbers of images.

    Args:
        image_embeds: (B, D) this rank's image embeddings, any norm; ranks may have different B, or none.
        text_embeds: (B, D) text embeddings; text i belongs to image i.
        logit_scale: () inverse temperature, after exp.
        group: the ranks.
        mask: (B,) bool, True for an image with a text; others take part in nothing.
        backend, strict: as for :func:`betaclip.kernels.similarity.similarity_logsumexp`.

    Returns:
        () in accumulation dtype, nats; the same on every rank. Its gradients are W times this rank's, so that their
        average over the W ranks is that of the mean.

    Raises:
        ValueError, NotImplementedError: as for :func:`betaclip.beta_cal_ce_loss`.
    """
    inputs = prepare(
        image_embeds.unsqueeze(1), text_embeds.unsqueeze(1), logit_scale, None if mask is None else mask.unsqueeze(1),
        None, "ignore",
    )  # fmt: skip
    images, scale = len(image_embeds), inputs.scale
    image, text = (unit_rows(e.to(scale.dtype)) for e in (inputs.image, inputs.text))
    # Ids that no other rank has; -1 for images without a text.
    valid = inputs.layout.image_id >= 0
    ids = torch.where(valid, torch.arange(images, device=scale.device) * group.size + group.rank, -1)
    all_ids = group.gather_rows(ids)
    all_image, all_text = group.gather_rows(torch.cat((image, text), 1).detach()).chunk(2, 1)
    losses = []
    for rows, own, columns in ((image, text, all_text), (text, image, all_image)):
        others, _ = similarity_logsumexp(
            rows.to(inputs.dtype), columns.to(inputs.dtype), scale, ids, all_ids, backend=backend, strict=strict
        )
        logit = scale * (rows * own.detach()).sum(1)
        losses.append(torch.where(valid, torch.logaddexp(others, logit) - logit, 0).sum())
    total, count = over_ranks(torch.stack(losses), valid.sum(), group)
    return total.sum() / count.clamp_min(1) / 2

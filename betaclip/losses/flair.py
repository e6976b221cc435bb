"""FLAIR's two losses (arXiv 2412.03561): sigmoid losses of whole images and of text-conditioned ones.

Both are B times the mean over their pairs of an image and a text, for B images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.backends import expect
from betaclip.kernels.precision import accumulation_dtype
from betaclip.kernels.similarity.operators import Backend
from betaclip.losses.across_ranks import over_ranks
from betaclip.losses.formulas import GroupLike, gathering_group
from betaclip.losses.functional import beta_cal_bce_loss
from betaclip.losses.inputs import as_scalar, check_tensor
from betaclip.process_group import ProcessGroup


def multi_positive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
    gather: bool | str = "auto",
    process_group: GroupLike | None = None,
    strict: bool = False,
) -> Tensor:
    """Sigmoid loss of each image with all texts, its own K being positives.

    Equivalent to:

        v, t = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1).flatten(0, 1)
        s = logit_scale * v @ t.T + logit_bias
        own = torch.eye(B).repeat_interleave(K, 1).bool()
        loss = F.softplus(torch.where(own, -s, s)).sum() / (B * K)

    in linear memory, for K times the products of that formula: it is B times the sigmoid form of β-CAL at β = 1 with
    one image embedding for all texts of an image. Where images have different numbers of texts, an image counts once
    for each of its own.

    Args:
        image_embeds: (B, D) embeddings of whole images, of any norm.
        text_embeds: (B, K, D) texts of each image, of any norm.
        logit_scale: () inverse temperature, after exp; may require a gradient.
        logit_bias: () added to every logit, may require a gradient; None for none.
        mask: (B, K) bool, True = valid text.
        backend, gather, process_group, strict: as for :func:`betaclip.beta_cal_ce_loss`.

    Returns:
        () in accumulation dtype, nats. 0 if no text is valid.

    Raises:
        ValueError, NotImplementedError, RuntimeError: as for :func:`betaclip.beta_cal_ce_loss`.

    Example:
        >>> import torch
        >>> from betaclip.losses.flair import multi_positive_loss
        >>> image = torch.eye(3)
        >>> texts = image[:, None].expand(3, 2, 3)  # two texts of each image, both like it
        >>> print(f"{multi_positive_loss(image, texts, 10.0, logit_bias=-5.0):.4f}")  # 3 log(1 + e^-5)
        0.0201
    """
    check_tensor("image_embeds", image_embeds)
    check_tensor("text_embeds", text_embeds)
    if image_embeds.dim() != 2:
        raise ValueError(f"image_embeds: expected (B, D), got shape {tuple(image_embeds.shape)}")
    if text_embeds.dim() != 3:
        raise ValueError(f"text_embeds: expected (B, K, D), got shape {tuple(text_embeds.shape)}")
    repeated = image_embeds.unsqueeze(1).expand(-1, text_embeds.shape[1], -1)
    loss = beta_cal_bce_loss(
        repeated, text_embeds, logit_scale, logit_bias=logit_bias, beta=1.0, mask=mask,
        backend=backend, gather=gather, process_group=process_group, strict=strict,
    )  # fmt: skip
    images = torch.full((), len(image_embeds), device=loss.device) if mask is None else mask.any(1).sum()
    group = gathering_group(gather, process_group)
    return (images if group is None else group.sum(images)) * loss


def text_conditioned_loss(
    cosines: Tensor,
    own: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Sigmoid loss of each image with Q texts, from the cosines of these texts with the image as they pool it.

    Equivalent to:

        s = logit_scale * cosines + logit_bias
        loss = F.softplus(torch.where(own, -s, s)).sum() / Q

    FLAIR scores each image with its own K texts and with one text of each other image, Q = B + K - 1. With a mask, Q is
    the mean number of valid texts of the images that have any.

    Args:
        cosines: (B, Q) from :meth:`betaclip.TextConditionedPool.score` with ``texts``.
        own: (B, Q) bool, True where the text is one of the image's own.
        logit_scale: () inverse temperature, after exp; may require a gradient.
        logit_bias: () added to every logit, may require a gradient; None for none.
        mask: (B, Q) bool, True = valid.
        group: sum over the ranks of this group; gradients are then W times those of this rank's pairs, for an average
            over the W ranks. None: this rank alone.

    Returns:
        () in accumulation dtype, nats. 0 if no text is valid.

    Raises:
        ValueError: an argument is malformed or disagrees with another; the message names it.

    Example:
        >>> import torch
        >>> from betaclip import TextConditionedPool
        >>> from betaclip.losses.flair import text_conditioned_loss
        >>> pool = TextConditionedPool(8, 2, mlp_ratio=0, norm_qkv=True, add_zero_attn=True)
        >>> patches, texts = torch.randn(3, 49, 8), torch.randn(6, 8)  # two texts for each of three images
        >>> chosen = torch.tensor([[0, 1, 3, 4], [0, 2, 3, 5], [1, 2, 4, 5]])
        >>> own = chosen // 2 == torch.arange(3)[:, None]
        >>> loss = text_conditioned_loss(pool.score(patches, texts, texts=chosen), own, 10.0, logit_bias=-10.0)
        >>> loss.backward()
    """
    check_tensor("cosines", cosines)
    if cosines.dim() != 2 or not cosines.is_floating_point():
        raise ValueError(f"cosines: expected floating-point (B, Q), got {cosines.dtype} {tuple(cosines.shape)}")
    for name, tensor in (("own", own), ("mask", mask)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.dtype != torch.bool or tensor.shape != cosines.shape:
            expected = f"bool of shape {tuple(cosines.shape)}"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {tuple(tensor.shape)}")
        expect(name, tensor, "as cosines", device=cosines.device)
    dtype = accumulation_dtype(cosines.dtype)
    valid = torch.ones_like(own) if mask is None else mask
    logits = as_scalar("logit_scale", logit_scale, cosines, dtype) * cosines.to(dtype).masked_fill(~valid, 0)
    if logit_bias is not None:
        logits = logits + as_scalar("logit_bias", logit_bias, cosines, dtype)
    losses = -F.logsigmoid(torch.where(own, logits, -logits)).masked_fill(~valid, 0)  # softplus rounds beyond 20
    total, counts = over_ranks(losses.sum(), torch.stack((valid.any(1).sum(), valid.sum())), group)
    return counts[0] * total / counts[1].clamp_min(1)

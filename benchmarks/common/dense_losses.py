"""β-CAL with its (B·K)² matrix, in two ways: the baselines of the loss benchmarks.

``published_*`` follow the released formula step by step, N × N intermediates included. Its accuracy counters are left
out, and so is its masking when there is nothing to mask: both in its favour. ``lean_*`` are what a careful user would
write instead, and the honest baseline: one similarity matrix, plain autograd, and the positives taken from a (B, K, K)
block. ``torch.compile`` is applied to these.

All take raw (B, K, D) embeddings and a () scale, normalise along D, and return one () loss with the released
code's treatment of padding (``padding="published"`` in betaclip), so that all can be compared.
"""

from collections.abc import Callable
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

DenseLoss = Callable[..., Tensor]
_EXCLUDED = -1e9  # the released code's logit of a padded text


def wide(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision, as autocast does before a softmax."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x normalised along D, optionally times ``scale``, in the dtype of x but rounded only once."""
    normalised = F.normalize(wide(x), dim=-1)
    return (normalised if scale is None else normalised * scale).to(x.dtype)


def _published_logits(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) image to text and (N, N) text to image, each by its own product."""
    v, t = unit(image).flatten(0, 1), unit(text).flatten(0, 1)
    return wide(scale * (v @ t.T)), wide(scale * (t @ v.T))


def _published_pairs(image: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) indicators, in the logits' dtype: same image, and own text."""
    images, texts, _ = image.shape
    image_of_row = torch.arange(images * texts, device=image.device) // texts
    same_image = (image_of_row[:, None] == image_of_row[None, :]).to(logits.dtype)
    return same_image, torch.eye(images * texts, dtype=logits.dtype, device=image.device)


def published_ce(
    image: Tensor, text: Tensor, scale: Tensor, *, beta: float = 0.5, alpha: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Soft cross-entropy against a dense target distribution, both ways."""
    to_text, to_image = _published_logits(image, text, scale)
    same_image, own = _published_pairs(image, to_text)
    weights = alpha * own + beta * (same_image * (1 - own))
    if mask is not None:
        valid = mask.flatten()
        weights = weights * (valid[:, None] & valid[None, :])
    target = weights / weights.sum(1, keepdim=True).clamp_min(1e-8)
    losses = [-(target * F.log_softmax(logits, 1)).sum(1) for logits in (to_text, to_image)]
    image_loss, text_loss = (loss.mean() if mask is None else loss[mask.flatten()].mean() for loss in losses)
    return (image_loss + text_loss) / 2


def published_bce(
    image: Tensor, text: Tensor, scale: Tensor, *, beta: float = 0.5, alpha: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Weighted binary cross-entropy against dense targets, both ways (the same matrix, transposed)."""
    to_text, to_image = _published_logits(image, text, scale)
    target, own = _published_pairs(image, to_text)
    weights = torch.ones_like(target).masked_fill(target.bool() & ~own.bool(), beta)
    weights = weights.masked_fill(own.bool(), alpha)
    if mask is not None:
        valid = mask.flatten()
        both = (valid[:, None] & valid[None, :]).to(target.dtype)
        target, weights = target * both, weights * both
        to_text, to_image = (logits.masked_fill(~valid[None, :], _EXCLUDED) for logits in (to_text, to_image))
    losses = [F.binary_cross_entropy_with_logits(s, target, weight=weights) for s in (to_text, to_image)]
    return (losses[0] + losses[1]) / 2


def within_images(
    v: Tensor, t: Tensor, beta: float, alpha: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, K, K) logits within each image, their weights w, and which pairs are valid (None: all)."""
    logits = wide(v) @ wide(t).mT
    own = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    weights = (alpha * own + beta * (1 - own)).expand_as(logits)
    pairs = None if mask is None else mask.unsqueeze(2) & mask.unsqueeze(1)
    return logits, weights if pairs is None else weights * pairs, pairs


def target_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """(B, K) sum_j q_ij S_ij, from within_images. Text to image has the same mean: w is symmetric, and its rows
    have one sum per image.
    """
    return (weights * logits).sum(2) / weights.sum(2).clamp_min(1e-8)


def mean_over_valid(rows: Tensor, mask: Tensor | None) -> Tensor:
    """() from (B, K)"""
    return rows.mean() if mask is None else torch.where(mask, rows, 0).sum() / mask.sum()


def lean_ce(
    image: Tensor, text: Tensor, scale: Tensor, *, beta: float = 0.5, alpha: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """loss_i = logsumexp_j S_ij - sum_j q_ij S_ij, both directions from one S."""
    v, t = unit(image, scale), unit(text)
    logits = wide(v.flatten(0, 1) @ t.flatten(0, 1).T)
    block, weights, _ = within_images(v, t, beta, alpha, mask)
    to_text, to_image = (mean_over_valid(logits.logsumexp(dim).view(block.shape[:2]), mask) for dim in (1, 0))
    return (to_text + to_image) / 2 - mean_over_valid(target_logits(block, weights), mask)


def lean_bce(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    beta: float = 0.5,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Every pair as a negative, corrected within images: one direction, as the other is the same sum."""
    v, t = unit(image, scale), unit(text)
    logits = wide(v.flatten(0, 1) @ t.flatten(0, 1).T)
    block, weights, pairs = within_images(v, t, beta, alpha, mask)
    if bias is not None:
        logits, block = logits.add_(bias), block + bias
    if mask is not None:
        valid = mask.flatten()
        logits = logits.masked_fill(~(valid[:, None] & valid[None, :]), -torch.inf)
    positives = weights * F.softplus(-block)
    negatives = F.softplus(block) if pairs is None else F.softplus(block) * pairs
    return (F.softplus(logits).sum() + (positives - negatives).sum()) / logits.numel()


PUBLISHED: MappingProxyType[str, DenseLoss] = MappingProxyType({"ce": published_ce, "bce": published_bce})
LEAN: MappingProxyType[str, DenseLoss] = MappingProxyType({"ce": lean_ce, "bce": lean_bce})

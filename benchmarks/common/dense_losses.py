"""β-CAL with its (B·K)² matrix, in two ways: the baselines of the loss benchmarks.

``published_*`` follow the released formula step by step, N × N intermediates included. Its accuracy counters and its
masking are left out, both in its favour. ``lean_*`` are what a careful user would write instead, and the honest
baseline: one similarity matrix, plain autograd, and the positives taken from a (B, K, K) block. ``torch.compile`` is
applied to these.

All take raw (B, K, D) embeddings and a () scale, normalise along D, and return one () loss. No text is padding.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

DenseLoss = Callable[..., Tensor]


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
    image_of_row = torch.arange(len(logits), device=image.device) // image.shape[1]
    same_image = (image_of_row[:, None] == image_of_row[None, :]).to(logits.dtype)
    return same_image, torch.eye(len(logits), dtype=logits.dtype, device=image.device)


def published_ce(image: Tensor, text: Tensor, scale: Tensor, beta: float = 0.5) -> Tensor:
    """Soft cross-entropy against a dense target distribution, both ways."""
    to_text, to_image = _published_logits(image, text, scale)
    same_image, own = _published_pairs(image, to_text)
    weights = own + beta * (same_image * (1 - own))
    target = weights / weights.sum(1, keepdim=True).clamp_min(1e-8)
    image_loss, text_loss = (-(target * F.log_softmax(logits, 1)).sum(1).mean() for logits in (to_text, to_image))
    return (image_loss + text_loss) / 2


def published_bce(image: Tensor, text: Tensor, scale: Tensor, beta: float = 0.5) -> Tensor:
    """Weighted binary cross-entropy against dense targets, both ways (the same matrix, transposed)."""
    to_text, to_image = _published_logits(image, text, scale)
    target, own = _published_pairs(image, to_text)
    weights = torch.ones_like(target).masked_fill(target.bool() & ~own.bool(), beta)
    losses = [F.binary_cross_entropy_with_logits(s, target, weight=weights) for s in (to_text, to_image)]
    return (losses[0] + losses[1]) / 2


def within_images(v: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(B, K, K) logits within each image, and (K, K) weights: 1 for a row's own text, ``beta`` for the others."""
    logits = wide(v) @ wide(t).mT
    own = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return logits, own + beta * (1 - own)


def target_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """() mean over rows of sum_j q_ij S_ij, from within_images; text to image too, as the weights are symmetric."""
    return (weights * logits).sum(2).mean() / weights[0].sum()


def lean_ce(image: Tensor, text: Tensor, scale: Tensor, beta: float = 0.5) -> Tensor:
    """loss_i = logsumexp_j S_ij - sum_j q_ij S_ij, both directions from one S."""
    v, t = unit(image, scale), unit(text)
    logits = wide(v.flatten(0, 1) @ t.flatten(0, 1).T)
    to_text, to_image = (logits.logsumexp(dim).mean() for dim in (1, 0))
    return (to_text + to_image) / 2 - target_logits(*within_images(v, t, beta))


def lean_bce(image: Tensor, text: Tensor, scale: Tensor, beta: float = 0.5, bias: Tensor | None = None) -> Tensor:
    """Every pair as a negative, corrected within images: one direction, as the other is the same sum."""
    v, t = unit(image, scale), unit(text)
    logits = wide(v.flatten(0, 1) @ t.flatten(0, 1).T)
    block, weights = within_images(v, t, beta)
    if bias is not None:
        logits, block = logits.add_(bias), block + bias
    positives = weights * F.softplus(-block)
    return (F.softplus(logits).sum() + (positives - F.softplus(block)).sum()) / logits.numel()


PUBLISHED: Mapping[str, DenseLoss] = {"ce": published_ce, "bce": published_bce}
LEAN: Mapping[str, DenseLoss] = {"ce": lean_ce, "bce": lean_bce}

"""Small batches for the losses that the benchmarks compare, and their gradients."""

import torch
from common import batches


def small_batch(form="ce", images=5, texts_per_image=4, dim=48):
    """float64 leaves; K = 1 for the forms of other libraries."""
    k = texts_per_image if form in ("ce", "bce") else 1
    return batches.synthetic_batch(images, k, dim, torch.float64, torch.device("cpu"))


def value_and_gradients(loss, batch):
    value = loss(batch)
    return value.detach(), *torch.autograd.grad(value, batch.leaves, materialize_grads=True)


def worst_error(outputs, truth):
    return max((x - y).abs().max().item() for x, y in zip(outputs, truth, strict=True))

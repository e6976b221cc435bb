"""Operators, losses and pooling on operands of random shapes, dtypes, norms, scales and masks, against float64."""

import random

import pytest
import torch
import torch.nn.functional as F
from support.similarity import (
    DEVICE,
    assert_as_good_as_eager,
    dense_logsumexp,
    dense_softplus,
    require,
    small,
    value_and_gradients,
)
from torch import Tensor

from betaclip import beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.kernels.attention_pool import attention_pool
from betaclip.kernels.similarity.functional import similarity_logsumexp, similarity_softplus

TRIALS = {"blockwise": 20, "triton": 3}  # Triton's interpreter is slow
LOSSES, POOLS = 30, {"folded": 20, "sdpa": 10, "reference": 10, "triton": 3}
DTYPES = [torch.float32, torch.float64]


def rows(chosen: random.Random, count: int, dim: int) -> Tensor:
    """Rows of norms around 1, at times of very unequal ones, with a row of zeros."""
    x = F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=1)
    spread = chosen.choice([0.1, 0.1, 3.0])
    x *= (spread * (2 * torch.rand(count, 1, dtype=torch.float64) - 1)).exp()
    if chosen.random() < 0.3:
        x[chosen.randrange(count)] = 0
    return x


def image_ids(chosen: random.Random, count: int) -> Tensor:
    """Sorted, some of them padding."""
    return torch.randint(-1, chosen.randint(1, 2 * count), (count,)).sort().values


@pytest.mark.parametrize("backend", TRIALS)
def test_similarity(chosen: random.Random, backend: str) -> None:
    for _ in range(TRIALS[backend]):
        n, m, dim = (chosen.randint(1, limit) for limit in (90, 130, 40))
        dtype = torch.float32 if backend == "triton" else chosen.choice(DTYPES)
        require(backend, dtype)
        scale, bias = chosen.choice([0.0, 0.01, 1.0, 9.0, 100.0]), chosen.choice([0.0, -10.0, 5.0])
        ids = (image_ids(chosen, n), image_ids(chosen, m)) if chosen.random() < 0.7 else (None, None)
        print(f"{n} x {m} x {dim}, {dtype}, scale {scale}, bias {bias}, {'ids' if ids[0] is not None else 'no ids'}")
        given = [t.to(DEVICE, dtype) for t in (rows(chosen, n, dim), rows(chosen, m, dim))]
        ids = tuple(None if i is None else i.to(DEVICE) for i in ids)
        s, b = (torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in (scale, bias))
        largest = scale * float(given[0].norm(dim=1).max() * given[1].norm(dim=1).max()) + abs(bias)

        def logsumexp(x, y, s, ids=ids):
            return torch.cat(similarity_logsumexp(x, y, s, *ids, backend=small(backend)))

        def summed_softplus(x, y, s, b, ids=ids):
            return similarity_softplus(x, y, s, b, *ids, backend=small(backend))

        for ours, dense, scalars, outputs in (
            (logsumexp, dense_logsumexp, (s,), n + m), (summed_softplus, dense_softplus, (s, b), n)
        ):  # fmt: skip
            weight = torch.randn(outputs, dtype=torch.float64, device=DEVICE)

            def eager(*inputs, dense=dense, ids=ids):
                return dense(*inputs, *ids)

            assert_as_good_as_eager(
                value_and_gradients(ours, weight, *given, *scalars),
                value_and_gradients(eager, weight, *given, *(v.to(dtype) for v in scalars)),
                value_and_gradients(eager, weight, *(t.double() for t in given), *scalars),
                largest,
            )


def softplus(s: Tensor) -> Tensor:
    return torch.logaddexp(s, torch.zeros_like(s))  # PyTorch's is off by 2e-9 above 20


def dense_loss(form: str, image: Tensor, text: Tensor, scale: Tensor, beta: float, mask: Tensor) -> Tensor:
    """β-CAL's formula on the whole matrix."""
    images, texts, _ = image.shape
    block = beta + (1 - beta) * torch.eye(texts, dtype=image.dtype)
    w = torch.block_diag(*[block] * images)[mask.flatten()][:, mask.flatten()]
    v, t = (F.normalize(e[mask], dim=-1) for e in (image, text))
    s = scale * v @ t.T
    if form == "bce":
        own = torch.arange(images).repeat_interleave(mask.sum(1))
        same = own[:, None] == own
        return torch.where(same, w * softplus(-s), softplus(s)).sum() / len(s) ** 2
    return (F.cross_entropy(s, w / w.sum(1, keepdim=True)) + F.cross_entropy(s.T, w.T / w.T.sum(1, keepdim=True))) / 2


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_losses(chosen: random.Random, form: str) -> None:
    loss = beta_cal_ce_loss if form == "ce" else beta_cal_bce_loss
    for _ in range(LOSSES):
        images, texts, dim = (chosen.randint(1, limit) for limit in (9, 7, 30))
        dtype, norm, scale = chosen.choice(DTYPES), 10 ** chosen.uniform(-3, 3), chosen.choice([0.1, 5.0, 100.0])
        beta = chosen.choice([0.0, 0.3, 1.0])
        print(f"{images} x {texts} x {dim}, {dtype}, norm {norm:.3g}, scale {scale}, beta {beta}")
        mask = torch.rand(images, texts) < chosen.choice([0.3, 0.8, 1.0])
        mask[0, 0] = True
        leaves = [torch.randn(images, texts, dim, dtype=torch.float64).mul(norm).to(dtype) for _ in range(2)]
        values = []
        for function, precision in ((loss, dtype), (None, torch.float64)):
            image, text = (leaf.to(precision).requires_grad_() for leaf in leaves)
            s = torch.tensor(scale, dtype=precision, requires_grad=True)
            if function is None:
                value = dense_loss(form, image, text, s, beta, mask)
            else:
                value = function(image, text, s, beta=beta, mask=mask)
            values.append([value.detach(), *torch.autograd.grad(value, (image, text, s))])
        eps = torch.finfo(dtype).eps
        if form == "bce":  # its positives are PyTorch's softplus
            eps = max(eps, 2.1e-9)
        for ours, truth in zip(*values, strict=True):
            # Logits are known to scale * eps; the embeddings' gradients are of the order of scale / norm.
            floor = 64 * eps * (1 + scale) * (1.0 if not truth.dim() else scale / norm)
            assert (ours.double() - truth).abs().max() <= floor


def dense_pool(x, q, k_weight, v_weight, v_bias, heads, mask, normalize):
    """The docstring's formula."""
    x = torch.where(mask[..., None], x, 0)
    x = F.normalize(x, dim=-1) if normalize else x
    q, k, v = (
        t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, F.linear(x, k_weight), F.linear(x, v_weight, v_bias))
    )
    s = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None], -torch.inf)
    out = torch.where(mask.any(1)[:, None, None, None], s.softmax(-1).nan_to_num() @ v, 0)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", POOLS)
def test_pooling(chosen: random.Random, backend: str) -> None:
    for _ in range(POOLS[backend]):
        images, patches, queries = (chosen.randint(1, limit) for limit in (4, 40, 12))
        heads = chosen.choice([1, 2, 3])
        dim = heads * chosen.choice([8, 16])
        dtype = torch.float32 if backend == "triton" else chosen.choice(DTYPES)
        normalize, sharp = chosen.random() < 0.7, chosen.choice([0.1, 1.0, 8.0])
        print(f"{images} x {patches} x {queries} x {dim}, {heads} heads, {dtype}, normalize {normalize}, sharp {sharp}")
        mask = (torch.rand(images, patches) < chosen.choice([0.1, 0.7, 1.0])).to(DEVICE)
        shapes = (images, patches, dim), (images, queries, dim), (dim, dim), (dim, dim), (dim,)
        given = [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
        given[1] *= sharp
        given[0][~mask] = chosen.choice([0.0, torch.nan, torch.inf])
        weight = torch.randn(images, queries, dim, dtype=torch.float64).to(DEVICE)
        values = []
        for function, precision in ((attention_pool, dtype), (dense_pool, dtype), (dense_pool, torch.float64)):
            leaves = [t.to(precision).requires_grad_() for t in given]
            options = {"normalize": normalize} | ({"backend": backend} if function is attention_pool else {})
            out = function(*leaves, heads, mask, **options)
            values.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
        size = max(
            float(t.abs().max()) for t in values[-1]
        )  # with one valid patch, some gradients are 0 by cancellation
        for ours, eager, truth in zip(*values, strict=True):
            error, allowed = ((t.double() - truth).abs().max() for t in (ours, eager))
            assert error <= 2 * allowed + 64 * (1 + sharp) * torch.finfo(dtype).eps * size

"""Arguments of the pooling operators, and the check of a backend against the reference."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.attention_pool.operators import (
    BACKENDS,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, K, P, D, H, no two alike where it matters: within one tile of the interpreter; ragged everything; one patch.
SIZES = [(2, 4, 16, 32, 4), (3, 5, 37, 40, 8), (5, 3, 1, 24, 2)]


def require(backend: str, dtype: torch.dtype) -> None:
    probe = torch.zeros(1, 1, 8, dtype=dtype, device=DEVICE)
    if reasons := BACKENDS[backend](probe, probe):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def arguments(b: int, k: int, p: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x of norms from 0.1 to 10, q that gives logits of a few nats, weights and bias."""
    x = F.normalize(torch.randn(b, p, d, dtype=torch.float64), dim=-1) * 10 ** (2 * torch.rand(b, p, 1) - 1)
    q, k_weight, v_weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((b, k, d), (d, d), (d, d)))
    tensors = (x, 3 * q, k_weight / d**0.25, v_weight / d**0.5, torch.randn(d, dtype=torch.float64))
    return [t.to(DEVICE, dtype) for t in tensors]


def some_masked(b: int, p: int) -> Tensor:
    """(B, P): one image all valid, one with none, others in part."""
    mask = torch.rand(b, p) < 0.6
    mask[0], mask[-1] = True, False
    return mask.to(DEVICE)


def projected(x, q, k_weight, v_weight, v_bias, heads, mask=None, normalize=True, zero_and_k_bias=None):
    """The docstring's formula, with a key of zeros if there is a bias of keys; for an image without patches, 0."""
    x = F.normalize(x, dim=-1) if normalize else x
    k, v = F.linear(x, k_weight, zero_and_k_bias), F.linear(x, v_weight, v_bias)
    some = None if mask is None else mask.any(1)
    if zero_and_k_bias is not None:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1), value=True)
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q.expand(x.shape[0], -1, -1), k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if mask is None:
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    logits = logits.masked_fill(~mask[:, None, None], torch.finfo(logits.dtype).min)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) * some[:, None, None]


def value_and_gradients(function: Callable[..., Tensor], weight: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of a weighted sum of it: non-uniform incoming gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]

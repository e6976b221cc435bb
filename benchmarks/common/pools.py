"""The poolings that are compared: as published, plain PyTorch, a peer, and ours.

Parts: "attention", from raw patches and queries to the output projection; "block", the same and the MLP. Each is built
on one batch, whose parameters all of them share, and returns the same (B, K, D).
"""

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip import TextConditionedPool
from betaclip.kernels.attention_pool.operators import BACKENDS
from betaclip.layers import QuickGELU
from common.harness import compiled_afresh, peer, require

PARTS = ("attention", "block")
MLP_RATIO = 4

Pool = Callable[[], Tensor]
# (B, K, H, Dh) queries, (B, P, H, Dh) keys and values -> (B, K, H, Dh)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PoolBatch:
    """patches: (B, P, D) and queries: (B, K, D), raw; pool: the published one, whose parameters all others take."""

    patches: Tensor
    queries: Tensor
    pool: "PublishedPool"

    def leaves(self, part: str) -> tuple[Tensor, ...]:
        """The tensors that gradients are taken with respect to: patches, queries, all parameters of the part."""
        own = self.pool if part == "block" else self.pool.attn
        return self.patches, self.queries, *own.parameters()

    def to(self, dtype: torch.dtype) -> "PoolBatch":
        """A copy as new leaves."""
        x, t = (y.detach().to(dtype, copy=True).requires_grad_() for y in (self.patches, self.queries))
        return PoolBatch(x, t, deepcopy(self.pool).to(dtype))


def synthetic_pool_batch(
    images: int, texts_per_image: int, patches: int, dim: int, heads: int, dtype: torch.dtype, device: torch.device
) -> PoolBatch:
    """Embeddings of varied norms; weights by which some patches count more than others; biases that are not zero."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        pool = PublishedPool(dim, heads)
        for name, parameter in pool.named_parameters():
            if name == "attn.in_proj_weight":
                parameter.data.mul_((2 * dim) ** 0.5)  # inputs of unit length give logits of unit spread
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        counts = (patches, texts_per_image)
        embeds = (torch.randn(images, n, dim) * torch.empty(images, n, 1).uniform_(0.5, 2) for n in counts)
        x, t = (y.to(device) for y in embeds)
    return PoolBatch(x, t, pool.to(device)).to(dtype)


def least_flop(part: str, phase: str, images: int, texts_per_image: int, patches: int, dim: int, heads: int) -> int:
    """FLOP of the products, folded or projected, whichever is less; the gradients are two more products for each.

    Projected: keys and values of each patch, query and output of each text, and in between scores and means of all
    heads, together P·D wide. Folded: each of H latent queries per text is D wide and needs its own scores and means;
    per text four projections: query, its folding, values, output.
    """
    projected = 2 * patches * dim**2 + 2 * texts_per_image * patches * dim + 2 * texts_per_image * dim**2
    folded = 2 * heads * texts_per_image * patches * dim + 4 * texts_per_image * dim**2
    mlp = 2 * MLP_RATIO * texts_per_image * dim**2 if part == "block" else 0
    return 2 * images * (min(projected, folded) + mlp) * (1 if phase == "forward" else 3)


class PublishedPool(nn.Module):
    """The block step by step as in the released code, which leaves the attention to nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim)
        hidden = MLP_RATIO * dim
        layers = [("c_fc", nn.Linear(dim, hidden)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(hidden, dim))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def attend(self, patches: Tensor, queries: Tensor) -> Tensor:
        x, t = F.normalize(patches, dim=-1), F.normalize(queries, dim=-1)
        return self.attn(t, x, x, need_weights=False)[0]

    def forward(self, patches: Tensor, queries: Tensor) -> Tensor:
        pooled = self.attend(patches, queries)
        return pooled + self.mlp(self.ln_2(pooled))


class ProjectedPool(PublishedPool):
    """The block as a careful user would write it: projections without nn.MultiheadAttention's copies and transposes."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__(dim, heads)
        self.attention = attention

    def attend(self, patches: Tensor, queries: Tensor) -> Tensor:
        x, t = F.normalize(patches, dim=-1), F.normalize(queries, dim=-1)
        dim, heads = x.shape[-1], (self.attn.num_heads, -1)
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        q = F.linear(t, weight[:dim], bias[:dim])
        k, v = F.linear(x, weight[dim:], bias[dim:]).chunk(2, -1)
        pooled = self.attention(*(y.unflatten(-1, heads) for y in (q, k, v)))
        return self.attn.out_proj(pooled.flatten(2))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def bound(pool: PublishedPool | TextConditionedPool, part: str, batch: PoolBatch, compiled: bool = False) -> Pool:
    """A call of the part on the batch, whose parameters replace the pool's of the same names."""
    parameters = dict(batch.pool.named_parameters())
    missing, unexpected = pool.to(batch.patches).load_state_dict(parameters, strict=False, assign=True)
    if unexpected or set(missing) - {"logit_scale"}:
        raise ValueError(f"parameters disagree: {missing} are missing, {unexpected} are unknown")
    call: Callable[..., Tensor] = pool.attend if part == "attention" else pool.forward
    call = compiled_afresh(call) if compiled else call
    return lambda: call(batch.patches, batch.queries)


def published(part: str, batch: PoolBatch) -> Pool:
    """The published pooling; in float64 it is the definition of correct."""
    return bound(batch.pool, part, batch)


def _projected(part: str, batch: PoolBatch, compiled: bool = False, attention: Attention = _sdpa) -> Pool:
    return bound(ProjectedPool(batch.pool.attn.embed_dim, batch.pool.attn.num_heads, attention), part, batch, compiled)


def _xformers(part: str, batch: PoolBatch) -> Pool:
    return _projected(part, batch, attention=peer("xformers.ops", batch.patches, True).memory_efficient_attention)


def _betaclip(backend: str, part: str, batch: PoolBatch) -> Pool:
    if backend != "auto":
        require(backend, batch.patches, BACKENDS[backend](batch.patches, batch.queries))
    dim, heads = batch.pool.attn.embed_dim, batch.pool.attn.num_heads
    return bound(TextConditionedPool(dim, heads, MLP_RATIO, backend=backend), part, batch)


def pool_implementations() -> dict[str, Callable[[str, PoolBatch], Pool]]:
    """Functions that import what they need and return the call, or raise Unavailable; in the order of the tables."""
    return {
        "published": published,
        "projected sdpa": _projected,
        "projected sdpa, compiled": partial(_projected, compiled=True),
        "xformers": _xformers,
        "betaclip/auto": partial(_betaclip, "auto"),
        **{f"betaclip/{x}": partial(_betaclip, x) for x in BACKENDS if x != "reference"},
    }

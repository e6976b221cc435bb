"""Pooling blocks and inputs of tests, and the formula that they are compared with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip import TextConditionedPool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


FLAIR_BLOCK = {"mlp_ratio": 0, "norm_qkv": True, "add_zero_attn": True}


def published(pool: TextConditionedPool, patches: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The docstring's formula, with nn.MultiheadAttention's own forward; and the attention."""
    patches, queries = F.normalize(patches, dim=-1), F.normalize(queries, dim=-1)
    if pool.ln_1 is not None:
        queries, patches = pool.ln_1(queries), pool.ln_1_kv(patches)
    out, weights = pool.attn(queries, patches, patches)
    hidden = pool.mlp.c_fc(pool.ln_2(out))
    return out + pool.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden)), weights


def block(norm_inputs: bool = False, backend: str = "auto", **kwargs: int) -> TextConditionedPool:
    """A float64 block whose biases and LayerNorms are not at their initial 0 and 1."""
    pool = TextConditionedPool(16, 4, norm_inputs=norm_inputs, backend=backend, **kwargs).to(DEVICE).double()
    with torch.no_grad():
        for p in pool.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return pool


def inputs(b: int = 3, k: int = 5, p: int = 7) -> tuple[Tensor, Tensor]:
    return tuple(3 * torch.randn(b, rows, 16, dtype=torch.float64, device=DEVICE) for rows in (p, k))


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that the backward keeps."""
    storages: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(t.untyped_storage().nbytes() for t in storages.values())

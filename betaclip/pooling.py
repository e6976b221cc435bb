"""Text-conditioned pooling: each text takes its own embedding of an image from the image's patches."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from betaclip.kernels.attention_pool.operators import attention_pool, attention_weights
from betaclip.kernels.precision import DTYPES, accumulation_dtype, unit_rows

# What ``score`` holds of pairs of images and texts at a time.
PAIR_BYTES = 64 * 2**20


class LayerNorm(nn.LayerNorm):
    """In float32 (float64 for float64), whatever the dtype of inputs and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        weight, bias = (p.to(dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP; as SiLU, which keeps one tensor for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class TextConditionedPool(nn.Module):
    """β-CLIP's pooling block (arXiv 2512.12678): a text queries the patches of an image by multi-head cross-attention.

    Equivalent to, with ``attn`` as an ``nn.MultiheadAttention`` computes it:

        patches, queries = F.normalize(patches, dim=-1), F.normalize(queries, dim=-1)
        out = attn(queries, patches, patches)[0]
        return out + mlp(ln_2(out))  # no residual from the query

    without keys, values or normalised patches wherever that is faster
    (:func:`betaclip.kernels.attention_pool.operators.attention_pool`). Parameters have the released checkpoints' names.

    Args:
        embed_dim: D, of patches and texts.
        num_heads: H, a divisor of D.
        mlp_ratio: width of the MLP's hidden layer over D.
        norm_inputs: LayerNorms of the queries (``ln_1``) and of the patches (``ln_1_kv``) after their normalisation.
            The released models have none.
        identity: start from projections that are identities and an MLP that adds nothing: a text attends to patches
            that resemble it, and its embedding of the image is their mean. Towers that start at random learn faster so;
            the released models start from random projections.
        backend: of the attention; ``"auto"`` chooses.

    Attributes:
        logit_scale: () logarithm of the inverse temperature of the loss over the pooled embeddings; the block itself
            does not use it.

    Raises:
        ValueError: ``embed_dim`` is not divisible by ``num_heads``; ``mlp_ratio`` leaves no hidden unit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4,
        norm_inputs: bool = False,
        identity: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}")
        self.backend = backend
        self.ln_1 = LayerNorm(embed_dim) if norm_inputs else None
        self.ln_1_kv = LayerNorm(embed_dim) if norm_inputs else None
        # Parameters, their names and their initialisation; the attention itself is attention_pool's.
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.ln_2 = LayerNorm(embed_dim)
        self.hidden = int(embed_dim * mlp_ratio)
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio: expected at least 1 / embed_dim = 1 / {embed_dim}, got {mlp_ratio}")
        c_fc, c_proj = nn.Linear(embed_dim, self.hidden), nn.Linear(self.hidden, embed_dim)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))
        if identity:
            for weight in (*self.attn.in_proj_weight.detach().chunk(3), self.attn.out_proj.weight):
                nn.init.eye_(weight)
            for zero in c_proj.parameters():
                nn.init.zeros_(zero)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def forward(
        self,
        patches: Tensor,
        queries: Tensor,
        *,
        patch_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Text-conditioned image embeddings.

        Args:
            patches: (B, P, D) patch embeddings of any norm.
            queries: (B, K, D) text embeddings of any norm, or (K, D): the same for every image.
            patch_mask: (B, P) bool, True = valid patch. An image without any gives zeros.
            query_mask: (B, K) bool, True = valid text; the others give zeros. What is masked may hold anything.
            need_weights: return the attention too, for pictures.

        Returns:
            (B, K, D), not normalised; with ``need_weights`` also the (B, K, P) attention, averaged over heads.
            In the dtype of the patches; under autocast, in its dtype.

        Raises:
            ValueError: an argument is malformed or disagrees with another; the message names it.
            NotImplementedError: the named backend cannot serve these inputs; the message says why.
        """
        patches, queries = self._prepare(patches, queries, patch_mask, query_mask)
        out = self._mlp(self._attention(patches, queries, patch_mask))
        out = _zero_without(out, patch_mask, query_mask)
        if not need_weights:
            return out
        k_weight = self.attn.in_proj_weight.to(patches.dtype).chunk(3)[1]
        weights = attention_weights(
            patches, queries, k_weight, self.attn.num_heads, patch_mask, normalize=self.ln_1_kv is None
        )
        return out, _zero_without(weights, None, query_mask)

    def attend(
        self,
        patches: Tensor,
        queries: Tensor,
        *,
        patch_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """``attn(queries, patches, patches)[0]`` (B, K, D), everything but the MLP; the arguments of ``forward``."""
        patches, queries = self._prepare(patches, queries, patch_mask, query_mask)
        return _zero_without(self._attention(patches, queries, patch_mask), patch_mask, query_mask)

    def score(self, patches: Tensor, queries: Tensor, *, patch_mask: Tensor | None = None) -> Tensor:
        """Cosine of every text with every image embedding that it conditions: all pairs of B images and M texts.

        Equivalent to:

            return F.cosine_similarity(self(patches, queries), queries, dim=-1)

        in O(B·M + (B + M)·D) memory: pairs are taken some at a time (64 MiB of them), and again in the backward. For
        text-conditioned negatives in training and for text-conditioned retrieval.

        Args:
            patches: (B, P, D) patch embeddings of any norm.
            queries: (M, D) text embeddings of any norm.
            patch_mask: (B, P) bool, True = valid patch. An image without any scores 0.

        Returns:
            (B, M) cosines in accumulation dtype: float32, or float64 for float64.

        Raises:
            ValueError, NotImplementedError: as for ``forward``.
        """
        if queries.dim() != 2:
            raise ValueError(f"queries: expected (M, D), got shape {tuple(queries.shape)}")
        dtype = accumulation_dtype(patches.dtype)
        units = unit_rows(queries.to(dtype))
        patches, queries = self._prepare(patches, queries, patch_mask, None)

        def pairs(x: Tensor, q: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
            """(b, m)"""
            out = _zero_without(self._mlp(self._attention(x, q, mask)), mask, None)
            return (unit_rows(out.to(dtype)) * unit).sum(-1)

        images, texts = self._pairs_at_a_time(queries.shape[1], dtype)
        masks = [None] * len(patches.split(images)) if patch_mask is None else patch_mask.split(images)
        return torch.cat(
            [
                torch.cat(
                    [
                        checkpoint(pairs, x, q, unit, mask, use_reentrant=False)
                        for q, unit in zip(queries.split(texts, 1), units.split(texts), strict=True)
                    ],
                    dim=1,
                )
                for x, mask in zip(patches.split(images), masks, strict=True)
            ]
        )

    def _pairs_at_a_time(self, texts: int, dtype: torch.dtype) -> tuple[int, int]:
        """How many images and texts. Few images by many texts: an image's patches are then projected once."""
        # Of each pair the hidden layer exists three times, the embedding eight times.
        width = 8 * self.attn.embed_dim + 3 * self.hidden
        pairs = max(1, PAIR_BYTES // (width * dtype.itemsize))
        texts = max(1, min(texts, pairs))
        return max(1, pairs // texts), texts

    def _prepare(
        self, patches: Tensor, queries: Tensor, patch_mask: Tensor | None, query_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Checked, in the dtype to compute in: patches (B, P, D), and projected queries (B or 1, K, D)."""
        self._check(patches, queries, patch_mask, query_mask)
        dtype = self._dtype(patches)
        if query_mask is not None:
            queries = queries.masked_fill(~query_mask[..., None], 0)
        queries = unit_rows(queries if queries.dim() == 3 else queries[None]).to(dtype)
        if self.ln_1_kv is not None:
            if patch_mask is not None:
                patches = patches.masked_fill(~patch_mask[..., None], 0)
            patches = self.ln_1_kv(unit_rows(patches))
        if self.ln_1 is not None:
            queries = self.ln_1(queries)
        weight, bias = (p.to(dtype).chunk(3)[0] for p in (self.attn.in_proj_weight, self.attn.in_proj_bias))
        return patches.to(dtype), F.linear(queries, weight, bias)

    def _attention(self, patches: Tensor, queries: Tensor, patch_mask: Tensor | None) -> Tensor:
        """(B, K, D) for what ``_prepare`` returns."""
        dtype, out_proj = patches.dtype, self.attn.out_proj
        _, k_weight, v_weight = self.attn.in_proj_weight.to(dtype).chunk(3)
        v_bias = self.attn.in_proj_bias.to(dtype).chunk(3)[2]  # the keys' bias cancels in the softmax
        out = attention_pool(
            patches, queries, k_weight, v_weight, v_bias, self.attn.num_heads, patch_mask,
            normalize=self.ln_1_kv is None, backend=self.backend,
        )  # fmt: skip
        return F.linear(out, out_proj.weight.to(dtype), out_proj.bias.to(dtype))

    def _mlp(self, out: Tensor) -> Tensor:
        return out + self.mlp(self.ln_2(out))

    def _dtype(self, patches: Tensor) -> torch.dtype:
        device = patches.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else patches.dtype

    def _check(self, patches: Tensor, queries: Tensor, patch_mask: Tensor | None, query_mask: Tensor | None) -> None:
        """Raise on malformed arguments."""
        width, weight = self.attn.embed_dim, self.attn.in_proj_weight
        if patches.dim() != 3 or patches.shape[1] == 0 or patches.shape[2] != width:
            raise ValueError(f"patches: expected (B, P, {width}) with P >= 1, got shape {tuple(patches.shape)}")
        images = patches.shape[0]
        shared = queries.dim() == 2 and queries.shape[1] == width
        if not shared and (queries.dim() != 3 or queries.shape[::2] != (images, width)):
            expected = f"({images}, K, {width}) or (K, {width}) as patches are {tuple(patches.shape)}"
            raise ValueError(f"queries: expected {expected}, got shape {tuple(queries.shape)}")
        for name, tensor in (("patches", patches), ("queries", queries)):
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
            if tensor.device != weight.device:
                raise ValueError(f"{name}: expected device {weight.device} as the module, got {tensor.device}")
            if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
                expected = f"dtype {weight.dtype} as the module's weights, or autocast"
                raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")
        shapes = {
            "patch_mask": (patch_mask, patches.shape[:2]),
            "query_mask": (query_mask, (images, queries.shape[-2])),
        }
        for name, (mask, shape) in shapes.items():
            if mask is None:
                continue
            if mask.shape != shape or mask.dtype != torch.bool:
                expected = f"bool of shape {tuple(shape)}, True = valid"
                raise ValueError(f"{name}: expected {expected}, got {mask.dtype} {tuple(mask.shape)}")
            if mask.device != patches.device:
                raise ValueError(f"{name}: expected device {patches.device} as for patches, got {mask.device}")


def _zero_without(out: Tensor, patch_mask: Tensor | None, query_mask: Tensor | None) -> Tensor:
    """``out`` (B, K, ...) with zeros for images without patches and for masked queries."""
    if patch_mask is not None:
        out = out.masked_fill(~patch_mask.any(1)[:, None, None], 0)
    if query_mask is not None:
        out = out.masked_fill(~query_mask[..., None], 0)
    return out

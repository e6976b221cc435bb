"""Text-conditioned pooling: each text pools an image's patches into its own embedding of that image."""

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from betaclip.kernels.attention_pool import rows
from betaclip.kernels.attention_pool.operators import attention_pool, attention_weights
from betaclip.kernels.precision import accumulation_dtype, autocast_dtype, unit_rows
from betaclip.layers import LayerNorm, QuickGELU, check_attention, has_hooks
from betaclip.pair_chunks import Budget, plan_pairs
from betaclip.pooling_inputs import check_inputs, check_pairs, check_texts

CLIP_LOGIT_SCALE = math.log(1 / 0.07)  # what CLIP starts from, arXiv 2103.00020


class _Operands(NamedTuple):
    """The arguments of ``attention_pool``, in the dtype of the computation."""

    patches: Tensor  # (B, P, D)
    queries: Tensor  # (B or 1, K, D), projected
    k_weight: Tensor  # (D, D)
    v_weight: Tensor  # (D, D)
    v_bias: Tensor  # (D,)
    k_bias: Tensor  # (D,), which counts beside a key of zeros alone


class TextConditionedPool(nn.Module):
    """β-CLIP's pooling block (arXiv 2512.12678): a text queries the patches of an image by multi-head cross-attention.

    Equivalent to, with ``attn`` an ``nn.MultiheadAttention``:

        patches, queries = F.normalize(patches, dim=-1), F.normalize(queries, dim=-1)
        out = attn(queries, patches, patches)[0]
        return out + mlp(ln_2(out))  # no residual from the query

    without materialising keys, values or normalised patches wherever that is faster
    (:func:`betaclip.kernels.attention_pool.operators.attention_pool`). Parameters have the names of the released
    checkpoints.

    The block reads the weights of ``attn`` and never calls it: parametrizations of ``attn`` take effect, wrappers of it
    and hooks on it are refused. ``attn.out_proj`` and the MLP are called, so adapters around them take effect.

    With ``mlp_ratio=0, norm_qkv=True, add_zero_attn=True`` it is FLAIR's block (arXiv 2412.03561), equivalent to, with
    ``attn`` an ``nn.MultiheadAttention`` with ``add_zero_attn``:

        return attn(ln_q(queries), ln_k(patches), ln_v(patches))[0]

    Both LayerNorms of the patches standardise them once; their weights and biases become parts of the projections, so
    that the block can still be folded. Those of ``ln_k`` and ``ln_v`` are read, as those of ``attn`` are.

    Args:
        embed_dim: D, the width of patches and texts.
        num_heads: H, a divisor of D.
        mlp_ratio: hidden width of the MLP as a multiple of D; 0 for a block without MLP.
        norm_inputs: apply LayerNorm to the queries (``ln_1``) and to the patches (``ln_1_kv``) after their
            normalisation. The released models do not.
        identity: initialise the projections to identities and the MLP to zero: a text attends to patches that resemble
            it, and the result is their weighted mean. Towers trained from scratch then learn faster; the released
            models start from random projections.
        norm_qkv: in place of normalising patches and queries, apply LayerNorm to the queries (``ln_q``) and to the
            patches, as keys (``ln_k``) and as values (``ln_v``).
        add_zero_attn: let texts also attend to a key and a value of zeros, and so to no patch.
        init_logit_scale: initial value of ``logit_scale``.
        backend: the backend of :func:`betaclip.kernels.attention_pool.attention_pool`; ``"auto"`` chooses.
        device, dtype: those of the parameters, as for PyTorch's modules.

    Attributes:
        logit_scale: () logarithm of the inverse temperature for a loss over the pooled embeddings. The block does not
            use it.

    Raises:
        ValueError: ``embed_dim`` is not divisible by ``num_heads``; ``mlp_ratio`` is not 0 but leaves no hidden unit;
            both ``norm_inputs`` and ``norm_qkv`` are set.

    Example:
        >>> import torch
        >>> from betaclip import TextConditionedPool
        >>> pool = TextConditionedPool(embed_dim=8, num_heads=2)
        >>> patches, texts = torch.randn(4, 49, 8), torch.randn(4, 3, 8)  # 4 images of 49 patches, 3 texts each
        >>> pool(patches, texts).shape
        torch.Size([4, 3, 8])
        >>> valid = torch.tensor([[True, True, False]]).expand(4, 3)
        >>> pool(patches, texts, query_mask=valid)[:, 2].count_nonzero().item()
        0
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4,
        norm_inputs: bool = False,
        identity: bool = False,
        *,
        norm_qkv: bool = False,
        add_zero_attn: bool = False,
        init_logit_scale: float = CLIP_LOGIT_SCALE,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}")
        hidden = int(embed_dim * mlp_ratio)
        if hidden < 1 and mlp_ratio != 0:
            expected = f"at least 1 / embed_dim = 1 / {embed_dim}, or 0 for no MLP"
            raise ValueError(f"mlp_ratio: expected {expected}, got {mlp_ratio}")
        if norm_inputs and norm_qkv:
            raise ValueError(
                "norm_qkv: expected False with norm_inputs=True, since both add LayerNorms to the inputs, got True"
            )
        placed: Any = {"device": device, "dtype": dtype}
        self.backend = backend
        self.ln_1 = LayerNorm(embed_dim, **placed) if norm_inputs else None
        self.ln_1_kv = LayerNorm(embed_dim, **placed) if norm_inputs else None
        self.ln_q, self.ln_k, self.ln_v = (LayerNorm(embed_dim, **placed) if norm_qkv else None for _ in range(3))
        # It has the parameters, their names and their initialisation; attention_pool computes the attention.
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, add_zero_attn=add_zero_attn, batch_first=True, **placed)
        self.ln_2: LayerNorm | None = None
        self.mlp: nn.Sequential | None = None
        self.hidden = hidden
        if hidden:
            self.ln_2 = LayerNorm(embed_dim, **placed)
            c_fc, c_proj = nn.Linear(embed_dim, hidden, **placed), nn.Linear(hidden, embed_dim, **placed)
            self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))
        if identity:
            for weight in (*self.attn.in_proj_weight.detach().chunk(3), self.attn.out_proj.weight):
                nn.init.eye_(weight)
            for zero in () if self.mlp is None else self.mlp.get_submodule("c_proj").parameters():
                nn.init.zeros_(zero)
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale, **placed))

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def forward(
        self,
        patches: Tensor,
        queries: Tensor,
        *,
        texts: Tensor | None = None,
        patch_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed each image once for each of its texts.

        Args:
            patches: (B, P, D) patch embeddings of any norm.
            queries: (B, K, D) text embeddings of any norm, or (K, D) for the same texts with every image.
            texts: (B, Q) int64, with queries (M, D): the texts to embed each image for, below 0 for none, which gives
                zeros. Each text is projected once, however many images it is for.
            patch_mask: (B, P) bool, True = valid patch. An image without valid patches gives zeros.
            query_mask: (B, K) bool, True = valid text. Masked texts give zeros, and may hold anything, NaN included.
                None with ``texts``.
            need_weights: also return the attention weights, for example to draw them.

        Returns:
            (B, K, D) text-conditioned image embeddings, not normalised, with ``texts`` (B, Q, D); with ``need_weights``
            also the (B, K, P) attention weights, averaged over heads, without that of the key of zeros. The dtype is
            that of the patches, or autocast's where it is enabled.

        Raises:
            ValueError: an argument is malformed or disagrees with another; the message names it.
            NotImplementedError: the named backend cannot run these inputs, ``attn``, ``ln_k`` or ``ln_v`` is wrapped or
                has hooks, or these two differ in eps; the message says why.

        Example:
            >>> import torch
            >>> from betaclip import TextConditionedPool
            >>> pool = TextConditionedPool(embed_dim=8, num_heads=2)
            >>> pooled, weights = pool(torch.randn(4, 49, 8), torch.randn(4, 3, 8), need_weights=True)
            >>> pooled.shape, weights.shape
            (torch.Size([4, 3, 8]), torch.Size([4, 3, 49]))
            >>> torch.allclose(weights.sum(-1), torch.ones(4, 3))
            True
        """
        if texts is not None:
            check_texts(patches, queries, texts, query_mask)
        operands = self._operands(patches, queries, patch_mask, query_mask)
        if texts is not None:
            query_mask = texts >= 0
            operands = operands._replace(queries=F.embedding(texts.clamp_min(0), operands.queries[0]))
        out = self._mlp(self._attention(operands, patch_mask))
        out = _zero_without(out, patch_mask, query_mask)
        if not need_weights:
            return out
        patches, queries, k_weight, *_ = operands
        weights = attention_weights(
            patches, queries, k_weight, self.attn.num_heads, patch_mask, **self._attention_options(operands)
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
        """The block without its MLP: ``attn(queries, patches, patches)[0]`` of the normalised inputs.

        Args:
            patches, queries, patch_mask, query_mask: as for :meth:`forward`.

        Returns:
            (B, K, D) attended patches, not normalised.

        Raises:
            ValueError, NotImplementedError: as for :meth:`forward`.

        Example:
            >>> import torch
            >>> from betaclip import TextConditionedPool
            >>> pool = TextConditionedPool(embed_dim=8, num_heads=2)
            >>> patches, texts = torch.randn(4, 49, 8), torch.randn(4, 3, 8)
            >>> out = pool.attend(patches, texts)
            >>> torch.allclose(pool(patches, texts), out + pool.mlp(pool.ln_2(out)))
            True
        """
        operands = self._operands(patches, queries, patch_mask, query_mask)
        return _zero_without(self._attention(operands, patch_mask), patch_mask, query_mask)

    def score(
        self,
        patches: Tensor,
        queries: Tensor,
        *,
        images: Tensor | None = None,
        texts: Tensor | None = None,
        patch_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        chunk_bytes: int = 64 * 2**20,
    ) -> Tensor:
        """Score pairs of B images and M texts: the cosine of each text with the image as that text pools it.

        Equivalent to:

            scores = F.cosine_similarity(self(patches, queries), queries, dim=-1)  # (B, M)
            if texts is not None:
                return scores.gather(1, texts)  # (B, Q)
            return scores if images is None else scores.T.gather(1, images)  # (M, J)

        but only for the pairs that are asked for, in memory proportional to the arguments and the result: pairs are
        computed a chunk at a time, and once more in the backward. An image's patches are projected once, unless its
        pairs do not fit into one chunk.

        Use it for text-conditioned retrieval, of all pairs or of the best few images of each text, and for
        text-conditioned negatives (``conditioned_negatives`` of :class:`betaclip.BetaCALLoss`).

        Args:
            patches: (B, P, D) patch embeddings of any norm.
            queries: (M, D) text embeddings of any norm.
            images: (M, J) int64, the images to score each text with; None for all. The pairs are put in order on the
                CPU: images on a GPU make the host wait for them.
            texts: (B, Q) int64, in place of ``images``: the texts to score each image with, below 0 for none, which
                scores 0.
            patch_mask: (B, P) bool, True = valid patch. An image without valid patches scores 0.
            query_mask: (M,) bool, True = valid text. Masked texts score 0, and may hold anything, NaN included.
            chunk_bytes: memory for the pairs of one chunk, in bytes.

        Returns:
            (B, M), (M, J) with ``images``, or (B, Q) with ``texts``: cosines in accumulation dtype, float32, or float64
            for float64 inputs.

        Raises:
            ValueError, NotImplementedError: as for :meth:`forward`; a number in ``images`` is not one of the B images,
                or one in ``texts``, if that is on the CPU, not one of the M texts.

        Example:
            >>> import torch
            >>> from betaclip import TextConditionedPool
            >>> pool = TextConditionedPool(embed_dim=8, num_heads=2)
            >>> patches, texts = torch.randn(4, 49, 8), torch.randn(10, 8)
            >>> scores = pool.score(patches, texts)
            >>> scores.shape
            torch.Size([4, 10])
            >>> images = torch.randint(4, (10, 2))  # two for each text
            >>> torch.allclose(pool.score(patches, texts, images=images), scores.T.gather(1, images), atol=1e-6)
            True
        """
        images = None if images is None else images.cpu()
        check_pairs(patches, queries, images, texts, query_mask)
        if query_mask is not None:
            queries = queries.masked_fill(~query_mask[:, None], 0)
        dtype = accumulation_dtype(patches.dtype)
        units = unit_rows(queries.to(dtype))
        operands = self._operands(patches, queries, patch_mask, None)
        patches, queries, *_ = operands

        def cosines(x: Tensor, q: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
            """(b, m) for the patches of b images and m projected queries, of all of them or of each."""
            out = self._mlp(self._attention(operands._replace(patches=x, queries=q), mask))
            return (unit_rows(_zero_without(out, mask, None).to(dtype)) * unit).sum(-1)

        def cosines_of(x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
            """(b, m) for the patches of b images and the numbers (b, m) of the texts of each."""
            return cosines(x, F.embedding(text, queries[0]), F.embedding(text, units), mask)

        budget = self._chunk_budget(patches.shape[1], dtype, chunk_bytes)
        if images is None:
            at_once = max(1, min(queries.shape[1] if texts is None else texts.shape[1], budget.texts()))
            count = budget.images(at_once)
            x_chunks = patches.split(count)
            masks = [None] * len(x_chunks) if patch_mask is None else patch_mask.split(count)
            if texts is None:
                exists, shared = query_mask, list(zip(queries.split(at_once, 1), units.split(at_once), strict=True))
                rows = [
                    [checkpoint(cosines, x, q, unit, mask, use_reentrant=False) for q, unit in shared]
                    for x, mask in zip(x_chunks, masks, strict=True)
                ]
            else:
                exists, texts = texts >= 0, texts.clamp_min(0)
                exists = exists if query_mask is None else exists & query_mask[texts]
                rows = [
                    [checkpoint(cosines_of, x, t, mask, use_reentrant=False) for t in text.split(at_once, 1)]
                    for x, text, mask in zip(x_chunks, texts.split(count), masks, strict=True)
                ]
            scores = torch.cat([torch.cat(row, 1) for row in rows])
            return scores if exists is None else scores.masked_fill(~exists, 0)
        device, valid = patches.device, None if query_mask is None else query_mask.cpu()
        plan = plan_pairs(images.to(torch.int64), len(patches), valid, budget)
        if len(plan.used) < len(patches):
            used = plan.used.to(device)
            patches, patch_mask = patches[used], None if patch_mask is None else patch_mask[used]
        masks = [None] * len(plan.sizes) if patch_mask is None else patch_mask.split(plan.sizes)
        slots = [
            checkpoint(cosines_of, x, text.to(device), mask, use_reentrant=False).flatten()
            for x, mask, pieces in zip(patches.split(plan.sizes), masks, plan.texts, strict=True)
            for text in pieces
        ]
        # A pair that is left out takes the appended 0; an empty piece joins the graph even if all pairs are left out.
        scores = torch.cat([queries.flatten()[:0].to(dtype), *slots, units.new_zeros(1)])
        return F.embedding(plan.place.to(device), scores[:, None])[..., 0]

    def _chunk_budget(self, num_patches: int, dtype: torch.dtype, chunk_bytes: int) -> Budget:
        # For each pair, the hidden layer exists three times and the embedding ten times; for each image, the patches
        # as they are, normalised, and as keys and values.
        width = self.attn.embed_dim
        pair, image = 10 * width + 3 * self.hidden, 4 * num_patches * width
        return Budget(chunk_bytes, pair * dtype.itemsize, image * dtype.itemsize)

    def _operands(
        self, patches: Tensor, queries: Tensor, patch_mask: Tensor | None, query_mask: Tensor | None
    ) -> _Operands:
        """Check the arguments, normalise them and project the queries."""
        check_attention(self.attn, "TextConditionedPool")
        in_weight, in_bias = self.attn.in_proj_weight, self.attn.in_proj_bias  # a parametrization computes them
        check_inputs(patches, queries, patch_mask, query_mask, in_weight)
        dtype = autocast_dtype(patches.device.type) or patches.dtype
        if query_mask is not None:
            queries = queries.masked_fill(~query_mask[..., None], 0)
        if patch_mask is not None and not self._normalizes_later:
            patches = patches.masked_fill(~patch_mask[..., None], 0)
        queries = queries if queries.dim() == 3 else queries[None]
        (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = in_weight.chunk(3), in_bias.chunk(3)
        if self.ln_q is not None and self.ln_k is not None and self.ln_v is not None:
            _check_norms(self.ln_k, self.ln_v)
            queries = self.ln_q(queries)
            patches = F.layer_norm(patches.to(accumulation_dtype(dtype)), patches.shape[2:], eps=self.ln_k.eps)
            k_weight, k_bias = _after_norm(self.ln_k, k_weight, k_bias)
            v_weight, v_bias = _after_norm(self.ln_v, v_weight, v_bias)
        else:
            queries = rows.unit_rows(queries).to(dtype)
        if self.ln_1_kv is not None:
            patches = self.ln_1_kv(rows.unit_rows(patches))
        if self.ln_1 is not None:
            queries = self.ln_1(queries)
        patches, queries, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias = (
            t.to(dtype) for t in (patches, queries, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias)
        )
        return _Operands(patches, F.linear(queries, q_weight, q_bias), k_weight, v_weight, v_bias, k_bias)

    @property
    def _normalizes_later(self) -> bool:
        """Whether patches are normalised by ``attention_pool`` alone."""
        return self.ln_1_kv is None and self.ln_k is None

    def _attention_options(self, operands: _Operands) -> dict[str, Any]:
        zero = self.attn.add_zero_attn
        return {"add_zero_attn": zero, "k_bias": operands.k_bias, "normalize": self._normalizes_later}

    def _attention(self, operands: _Operands, patch_mask: Tensor | None) -> Tensor:
        """(B, K, D)"""
        out = attention_pool(
            *operands[:5], self.attn.num_heads, patch_mask, **self._attention_options(operands), backend=self.backend
        )
        return self.attn.out_proj(out)

    def _mlp(self, out: Tensor) -> Tensor:
        return out if self.mlp is None or self.ln_2 is None else out + self.mlp(self.ln_2(out))


def _after_norm(norm: LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias, in accumulation dtype, that give of standardised rows what the given ones give of ``norm``."""
    dtype = accumulation_dtype(weight.dtype)
    weight, bias, scale, shift = (t.to(dtype) for t in (weight, bias, norm.weight, norm.bias))
    return weight * scale, bias + (weight * shift).sum(1)


def _check_norms(ln_k: LayerNorm, ln_v: LayerNorm) -> None:
    """Raise NotImplementedError if reading the LayerNorms' weights gives something else than calling them."""
    for name, norm in (("ln_k", ln_k), ("ln_v", ln_v)):
        if type(norm).forward is not LayerNorm.forward or "forward" in vars(norm) or has_hooks(norm):
            reason = f"{name} has hooks or a forward of its own, which would never be called"
            raise NotImplementedError(f"TextConditionedPool reads the weights of ln_k and ln_v, but {reason}")
    if ln_k.eps != ln_v.eps:
        raise NotImplementedError(
            f"TextConditionedPool standardises patches once for ln_k and ln_v; expected the same eps in both, "
            f"got {ln_k.eps} and {ln_v.eps}"
        )


def _zero_without(out: Tensor, patch_mask: Tensor | None, query_mask: Tensor | None) -> Tensor:
    """``out`` (B, K, ...) with zeros for images without valid patches and for masked queries."""
    if patch_mask is not None:
        out = out.masked_fill(~patch_mask.any(1)[:, None, None], 0)
    if query_mask is not None:
        out = out.masked_fill(~query_mask[..., None], 0)
    return out
